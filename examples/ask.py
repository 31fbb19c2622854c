"""Ask an adapted model that is served: `python -m examples.ask ./saved-model "Hello"`, beside a server of it."""

import sys

from openai import OpenAI


def ask(model: str, prompt: str, url: str = "http://localhost:8000/v1") -> tuple[str, list[int]]:
    """An answer of at most two iterations for each token, and the depths of prompt and answer."""
    with OpenAI(base_url=url, api_key="-") as client:
        answer = client.completions.create(
            model=model,
            prompt=prompt,
            max_tokens=8,
            temperature=0.7,
            extra_body={"max_depth": 2, "seed": 1},
        )
    depth: list[int] = answer.usage.model_extra["depth"] if answer.usage and answer.usage.model_extra else []
    return answer.choices[0].text, depth


if __name__ == "__main__":
    print(*ask(*sys.argv[1:]), sep="\n")
