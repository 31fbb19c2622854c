"""EleutherAI's lm-eval on a saved adapted model, from the command line in a new process."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("lm_eval")

import torch
from lm_eval.api.instance import Instance
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import adadepth as ad
from adadepth.hf import AdaptiveForCausalLM, adapt
from adadepth.hf.harness import AdaptiveLM

ROOT = Path(__file__).parent.parent
TASKS = ROOT / "tests" / "harness_task"
# "cat" is 0, what lm-eval pads with.
WORDS = ["cat", "the", "a", "dog", "bird", "it", "sees", "sings", "sleeps", "and", "<unk>", "<eos>"]
STEPS = 3


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")


def llama() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=WORDS.index("<eos>"),
    )


def make_model() -> AdaptiveForCausalLM:
    torch.manual_seed(0)
    gate = ad.PerIterationMLPGate(16, STEPS, hidden=8)
    model = adapt(LlamaForCausalLM(llama()), STEPS, gate, ad.Threshold(0.02), layers=slice(1, 3)).double()
    for p in gate.parameters():
        nn.init.normal_(p)
    nn.init.constant_(model.loop.update.alpha, 0.8)
    return model.eval()


class Saved(NamedTuple):
    path: Path
    model: AdaptiveForCausalLM
    tokenizer: PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    path = tmp_path_factory.mktemp("model")
    model, tokenizer = make_model(), make_tokenizer()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return Saved(path, model, tokenizer)


class Run(NamedTuple):
    printed: str
    config: dict[str, Any]
    results: dict[str, dict[str, Any]]
    samples: dict[str, list[dict[str, Any]]]


# `python -m adadepth.hf.lm_eval`, with no tasks but ours and without 100,000 samples for the error of each score.
COMMAND = """
import functools, runpy
import lm_eval.api.metrics, lm_eval.tasks
lm_eval.tasks.TaskManager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
lm_eval.api.metrics.bootstrap_stderr = lambda *args, **options: 0.0
runpy.run_module("adadepth.hf.lm_eval", run_name="__main__", alter_sys=True)
"""


def lm_eval(model_args: str, out: Path) -> Run:
    """All three tasks in a new process."""
    command = [sys.executable, "-c", COMMAND, "--model", "adadepth", "--model_args", model_args]
    command += ["--tasks", "adadepth_choice,adadepth_text,adadepth_continue", "--include_path", "."]
    command += ["--batch_size", "4", "--device", "cpu", "--output_path", str(out), "--log_samples"]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(out / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(command, cwd=TASKS, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (results,) = out.rglob("results_*.json")
    read = json.loads(results.read_text())
    samples = {
        path.name.split("_")[2]: [json.loads(line) for line in path.read_text().splitlines()]
        for path in out.rglob("samples_*.jsonl")
    }
    return Run(done.stdout, read["config"], read["results"], samples)


class ByHand:
    """Every request alone, without padding and without cache; and all that must have run for them."""

    def __init__(self, saved: Saved, **budget: Any) -> None:
        self.model, self.tokenizer, self.budget = saved.model, saved.tokenizer, budget
        self.texts: set[tuple[int, ...]] = set()

    @torch.no_grad()
    def predict(self, ids: list[int]) -> Tensor:
        return self.model(torch.tensor([ids]), **self.budget).logits[0].log_softmax(-1)

    def loglikelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        ids, start = self.tokenizer.encode(context + continuation), len(self.tokenizer.encode(context))
        return self._score(ids, start)

    def rolling(self, text: str) -> float:
        return self._score([self.tokenizer.eos_token_id, *self.tokenizer.encode(text)], 1)[0]

    def _score(self, ids: list[int], start: int) -> tuple[float, bool]:
        self.texts.add(tuple(ids[:-1]))
        predicted, words = self.predict(ids[:-1])[start - 1 :], torch.tensor(ids[start:])
        return float(predicted.gather(1, words[:, None]).sum()), bool((predicted.argmax(-1) == words).all())

    def generate(self, prompt: str, until: list[str], limit: int) -> str:
        ids = self.tokenizer.encode(prompt)
        start = len(ids)
        ends = [WORDS.index(word) for word in (*until, "<eos>")]
        while len(ids) < start + limit and (len(ids) == start or ids[-1] not in ends):
            ids.append(int(self.predict(ids)[-1].argmax()))
        self.texts.add(tuple(ids[:-1]))
        text = self.tokenizer.decode(ids[start:], skip_special_tokens=True)
        for end in until:
            text = text.split(end)[0]
        return text

    @torch.no_grad()
    def depths(self) -> Tensor:
        """Of all tokens; what two requests share ran once."""
        return torch.cat([self.model(torch.tensor([ids]), **self.budget).trace.depth[0] for ids in self.texts])


def assert_same(got: Any, want: tuple[float, bool]) -> None:
    assert float(got[0]) == pytest.approx(want[0], rel=1e-10)
    assert str(got[1]) == str(want[1])


@pytest.mark.every
def test_the_command_line_gives_scores_and_depths(saved: Saved, tmp_path: Path) -> None:
    run, hand = lm_eval(f"pretrained={saved.path},dtype=float64", tmp_path), ByHand(saved)
    right, words, log_text, exact = [], 0, 0.0, []
    for sample in run.samples["choice"]:
        want = [hand.loglikelihood(*request.values()) for request in sample["arguments"].values()]
        for (got,), expected in zip(sample["resps"], want, strict=True):
            assert_same(got, expected)
        right.append(max(range(3), key=lambda i: want[i][0]) == sample["doc"]["answer"])
    for sample in run.samples["text"]:
        log_text += hand.rolling(sample["doc"]["text"])
        words += len(sample["doc"]["text"].split())
    for sample in run.samples["continue"]:
        written = hand.generate(sample["doc"]["prompt"], ["cat", "dog"], 8)
        assert sample["resps"] == [[written]]
        exact.append(written == sample["doc"]["answer"])
    assert 0 < sum(right) < len(right)
    assert 0 < sum(exact) < len(exact)
    assert run.results["adadepth_choice"]["acc,none"] == pytest.approx(sum(right) / len(right))
    assert run.results["adadepth_continue"]["exact_match,none"] == pytest.approx(sum(exact) / len(exact))
    assert run.results["adadepth_text"]["word_perplexity,none"] == pytest.approx(math.exp(-log_text / words))
    depths = hand.depths()
    mean = float(depths.double().mean())
    assert depths.unique().tolist() == [1, 2, 3]
    assert run.config["depth_tokens"] == len(depths)
    assert run.config["mean_depth"] == pytest.approx(mean)
    assert run.config["relative_flops"] == pytest.approx((1 + 2 * mean) / 3)  # one layer runs once, two are looped
    line = f"adadepth: mean depth {mean:.3f} of 3, relative FLOPs {(1 + 2 * mean) / 3:.3f}, over {len(depths)} tokens"
    assert line in run.printed.splitlines()


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, argument, i) for i, argument in enumerate(arguments)]


def load(saved: Saved, **arguments: Any) -> AdaptiveLM:
    return AdaptiveLM(str(saved.path), dtype="float64", device="cpu", **arguments)


PAIRS = [("the dog", " sees a cat cat cat"), ("a bird sings and the", " cat it"), ("it", " sleeps"), ("it", " sings")]
TEXTS = [("cat sees a cat and a dog sees a cat cat",), ("it sings",), ("the cat",)]
PROMPTS = ["the cat sees", "it", "a bird sings and the cat sleeps and"]


@pytest.mark.parametrize(
    ("batch_size", "arguments", "budget"),
    [
        (1, {}, {}),
        (3, {"max_depth": 2}, {"max_depth": 2}),
        (3, {"min_depth": 3}, {"min_depth": 3}),
        (3, {"threshold": 0.9}, {"rule": ad.Threshold(0.9)}),
        pytest.param("auto", {}, {}, marks=pytest.mark.every),
    ],
)
def test_budgets_hold_for_every_request(
    saved: Saved, batch_size: int | str, arguments: dict[str, Any], budget: dict[str, Any]
) -> None:
    lm = load(saved, batch_size=batch_size, max_batch_size=4, **arguments)
    hand, options = ByHand(saved, **budget), {"until": ["cat", "dog"], "max_gen_toks": 5}
    for got, pair in zip(lm.loglikelihood(requests("loglikelihood", *PAIRS)), PAIRS, strict=True):
        assert_same(got, hand.loglikelihood(*pair))
    for got, (text,) in zip(lm.loglikelihood_rolling(requests("rolling", *TEXTS)), TEXTS, strict=True):
        assert got == pytest.approx(hand.rolling(text), rel=1e-10)
    prompts = requests("generate_until", *((prompt, dict(options)) for prompt in PROMPTS))
    assert lm.generate_until(prompts) == [hand.generate(prompt, ["cat", "dog"], 5) for prompt in PROMPTS]
    info, depths = lm.get_model_info(), hand.depths()
    assert info["depth_tokens"] == len(depths)
    assert info["mean_depth"] == pytest.approx(float(depths.double().mean()))


def test_texts_that_differ_in_zeros_at_the_end_only(saved: Saved) -> None:
    lm, hand = load(saved, batch_size=4), ByHand(saved)
    pairs = [("the dog", " cat cat cat it"), ("the dog", " cat it"), ("the", " dog it"), ("cat", " cat cat it")]
    for got, pair in zip(lm.loglikelihood(requests("loglikelihood", *pairs)), pairs, strict=True):
        assert_same(got, hand.loglikelihood(*pair))


def test_a_gate_of_ones_own_is_found_where_it_is_said_to_be(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_gates.py").write_text(
        "import adadepth as ad\n"
        "class First(ad.Gate):\n"
        "    def forward(self, h, previous, step):\n"
        "        return h[..., 0]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = make_model()
    model.loop.gate = importlib.import_module("my_gates").First()
    model.save_pretrained(tmp_path)
    saved.tokenizer.save_pretrained(tmp_path)
    del sys.modules["my_gates"]
    lm = AdaptiveLM(str(tmp_path), dtype="float64", device="cpu", imports="my_gates+json")
    assert_same(
        lm.loglikelihood(requests("loglikelihood", PAIRS[0]))[0],
        ByHand(saved._replace(model=model)).loglikelihood(*PAIRS[0]),
    )


def test_every_process_knows_what_all_ran(saved: Saved) -> None:
    class Accelerator:
        """Of two processes, of which the other ran ten iterations over five tokens."""

        unwrap_model = staticmethod(lambda model: model)
        wait_for_everyone = staticmethod(lambda: None)
        gather = staticmethod(lambda counts: torch.cat([counts, torch.tensor([[10, 5]])]))

    lm = load(saved)
    lm.loglikelihood(requests("loglikelihood", *PAIRS))
    alone = lm.get_model_info()
    lm.accelerator, lm._world_size = Accelerator(), 2
    lm.barrier()
    lm.barrier()
    info = lm.get_model_info()
    assert info["depth_tokens"] == alone["depth_tokens"] + 5
    iterations = alone["mean_depth"] * alone["depth_tokens"] + 10
    assert info["mean_depth"] == pytest.approx(iterations / info["depth_tokens"])


def test_lm_eval_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "adadepth.hf.harness")
    with pytest.raises(ImportError, match="lm_eval") as error:
        importlib.import_module("adadepth.hf.harness")
    assert str(error.value) == "lm_eval is not installed. Install it with: pip install 'adadepth[lm-eval]'"


def test_nothing_has_run(saved: Saved, capsys: Any) -> None:
    info = load(saved).get_model_info()
    assert (info["mean_depth"], info["relative_flops"], info["depth_tokens"]) == (None, None, 0)
    assert "mean depth" not in capsys.readouterr().out


def test_a_model_that_is_not_adapted(saved: Saved, tmp_path: Path) -> None:
    LlamaForCausalLM(llama()).save_pretrained(tmp_path)
    saved.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="adadepth") as error:
        AdaptiveLM(str(tmp_path), device="cpu")
    assert str(error.value) == (
        f"--model adadepth expected a model saved by AdaptiveForCausalLM.save_pretrained, got one of type llama from "
        f"{tmp_path}. For that use --model hf."
    )


def test_a_threshold_for_another_rule(saved: Saved, tmp_path: Path) -> None:
    model = make_model()
    model.loop.rule = ad.ACT(0.1)
    model.save_pretrained(tmp_path)
    saved.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="threshold") as error:
        AdaptiveLM(str(tmp_path), device="cpu", threshold=0.5)
    assert str(error.value) == (
        "threshold expected a model whose rule is Threshold or SurvivalThreshold, got ACT(eps=0.1). Save the model "
        "with one of them as its loop's rule, or omit threshold."
    )
