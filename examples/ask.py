"""Ask an adapted model that is served: `python -m examples.ask ./saved-model "Hello"`, beside a server of it."""

import argparse
from collections.abc import Sequence

from openai import OpenAI, OpenAIError

URL = "http://localhost:8000/v1"


def ask(model: str, prompt: str, url: str = URL) -> tuple[str, list[int]]:
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


def main(args: Sequence[str] | None = None) -> None:
    """Print the answer and the depths; what the server refuses is said in one line."""
    parser = argparse.ArgumentParser(prog="python -m examples.ask", description=__doc__)
    parser.add_argument("model", help="the path of the model, as the server was given it")
    parser.add_argument("prompt")
    parser.add_argument("url", nargs="?", default=URL, help="of the server (default: %(default)s)")
    parsed = parser.parse_args(args)
    try:
        print(*ask(parsed.model, parsed.prompt, parsed.url), sep="\n")
    except OpenAIError as error:
        raise SystemExit(f"error: {parsed.url}: {error}") from None


if __name__ == "__main__":
    main()
