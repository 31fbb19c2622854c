"""Text coloured by the depth of its tokens, in HTML and in the terminal.

Tokens are pieces of text; joined, they give the whole text. `pieces` makes them from ids. A token of depth 0 is
padding and is left out. Control characters other than tab and newline are printed as symbols (from U+2400 on).
"""

import re
from collections.abc import Callable, Iterator, Sequence
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from .._extras import need
from .checks import check_depth, check_like_depth
from .colours import CARD, INK, RULE, both, depth_colour, night

if TYPE_CHECKING:
    import rich.text

Tokens = Sequence[str] | Sequence[Sequence[str]]
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}
_UNPRINTABLE = re.compile("[\x80-\x9f\ud800-\udfff]")  # C1 controls, and surrogates, which no file can hold
# Marks are drawn by CSS, so copied text does not contain them. The mark of a tab has no width: columns stay aligned.
_MARKED = {"\n": "<i>\n</i>", "\t": "<b>\t</b>"}
_STYLE = f"""
.adadepth p{{margin:0 0 .5em;line-height:1.9}}
.adadepth p span{{padding:.15em .6em}}
.adadepth div{{margin:0 0 .75em;padding:.6em .9em;border:1px solid {both(RULE)};border-radius:6px;\
background:{both(CARD)};color:{both(INK)};font:.875em/1.75 ui-monospace,Menlo,Consolas,monospace;\
white-space:pre-wrap;overflow-wrap:anywhere;tab-size:4}}
.adadepth span{{padding:.2em 0;color:{both(INK)};print-color-adjust:exact}}
.adadepth i,.adadepth b{{font:inherit;position:relative}}
.adadepth i::before{{content:"↵";opacity:.55}}
.adadepth b::before{{content:"→";opacity:.55;position:absolute}}
"""


class _Token(NamedTuple):
    text: str
    depth: int
    nll: float | None


def heat_map(
    tokens: Tokens, depth: Int[Tensor, "*rows"], steps: int, *, nll: Float[Tensor, "*rows"] | None = None
) -> str:
    """The text as HTML, with each token on the colour of its depth, under a legend.

    The result is a fragment for any page. It contains its own style, needs no script and loads nothing. Its colours
    follow the page's `color-scheme`. The tooltip of a token gives its depth and NLL. Without `nll`, neighbouring
    tokens of equal depth share a span.

    Shapes: `depth` and `nll (seq,)` with `seq` tokens, or `(batch, seq)` with `batch` sequences of `seq` tokens.
    Arguments: `tokens`, pieces of text; `depth`, as in `trace.depth`; `steps`, those of the loop; `nll`, in nats.
    Raises: `ValueError` if the numbers of tokens and depths differ, or a depth is not in 0..steps.
    """
    rows = _rows("heat_map", tokens, depth, steps, nll)
    colours = (f".of{steps} .d{i}{{background:{both(depth_colour(i, steps))}}}\n" for i in range(1, steps + 1))
    texts = (f"<div>{''.join(_spans(row))}</div>\n" for row in rows)
    return (
        f'<div class="adadepth of{steps}">\n<style>{_STYLE}{"".join(colours)}</style>\n'
        f"<p>{_legend(depth, steps)}</p>\n{''.join(texts)}</div>\n"
    )


def terminal(tokens: Tokens, depth: Int[Tensor, "*rows"], steps: int) -> "rich.text.Text":
    """The text for a rich console, with each token on the colour of its depth; each row is a line.

    Background and text colours are those of a dark page. Tokens that ran more than half of the iterations are also
    bold, so that depth is visible without colours.

    Shapes, arguments and errors: those of `heat_map`; `ImportError` without rich.
    """
    text = need("rich.text", "viz").Text()
    for i, row in enumerate(_rows("terminal", tokens, depth, steps, None)):
        text.append("\n" if i else "")
        for token in row:
            bold = "bold " if 2 * token.depth > steps else ""
            text.append(token.text, f"{bold}{night(INK)} on {night(depth_colour(token.depth, steps))}")
    return text


def pieces(decode: Callable[[list[int]], str], ids: Int[Tensor, " seq"] | Sequence[int]) -> list[str]:
    """The text of each token; joined, the pieces give the whole text.

    Decoding each token by itself would not do: a tokenizer drops the space before a first word, and one character may
    take several tokens. The last of these tokens gets the character, the others get "".

    Shapes: `ids (seq,)` to `seq` pieces.
    Arguments: `decode`, a function of a list of ids, such as `tokenizer.decode`; for bytes,
    `lambda ids: bytes(ids).decode(errors="replace")`. It must not clean up spaces, which rewrites earlier text: pass
    `clean_up_tokenization_spaces=False` to a tokenizer that does.
    """
    ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
    found, start, done, before = list[str](), 0, 0, ""  # `before` is the text of ids[start:done]
    for end in range(1, len(ids) + 1):
        # The token before is decoded again together with the new one, so that the new one is not a first word.
        text = decode(ids[start:end])
        new = text[len(before) :]
        if new.endswith("\ufffd") and end < len(ids):
            found.append("")
            continue
        found.append(new)
        # A token without a text of its own, such as a hidden special token, cannot be the token before.
        if alone := decode(ids[done:end]):
            start, before = done, alone
        else:
            before = text
        done = end
    return found


def _rows(owner: str, tokens: Tokens, depth: Tensor, steps: int, nll: Tensor | None) -> list[list[_Token]]:
    """The real tokens of each row."""
    if depth.dim() not in (1, 2):
        raise ValueError(f"{owner} expected depths of shape (seq,) or (batch, seq), got {tuple(depth.shape)}.")
    check_depth(owner, depth, steps)
    check_like_depth(owner, "nll", nll, depth)
    rows: Sequence[Any] = [tokens] if depth.dim() == 1 else tokens
    depths = depth.unsqueeze(0) if depth.dim() == 1 else depth
    if len(rows) != len(depths):
        raise ValueError(
            f"{owner} expected the tokens of {len(depths)} rows, one for each row of depths, got {len(rows)}."
        )
    losses = [None] * len(rows) if nll is None else nll.view_as(depths)
    return [_row(owner, *of_row) for of_row in zip(rows, depths, losses, strict=True)]


def _row(owner: str, tokens: Sequence[str], depth: Tensor, nll: Tensor | None) -> list[_Token]:
    if len(tokens) != len(depth):
        raise ValueError(
            f"{owner} expected as many tokens as depths, {len(depth)}, got {len(tokens)}. Only tokens that ran have a "
            "depth; the newest token of a generation has none."
        )
    if others := [token for token in tokens if not isinstance(token, str)]:
        raise ValueError(
            f"{owner} expected pieces of text, got {type(others[0]).__name__} {others[0]!r}. Make them of ids by "
            "adadepth.viz.pieces(tokenizer.decode, ids)."
        )
    losses = [None] * len(depth) if nll is None else nll.tolist()
    numbers = zip(tokens, depth.tolist(), losses, strict=True)
    return [_Token(_shown(text), deep, loss) for text, deep, loss in numbers if deep]


def _shown(text: str) -> str:
    return _UNPRINTABLE.sub("\ufffd", text.translate(_PICTURES))


def _spans(row: list[_Token]) -> Iterator[str]:
    """The spans of a row; neighbours with the same depth and no NLL share one."""
    for _, run in groupby(enumerate(row), lambda item: (item[1].depth, item[1].nll is None or item[0])):
        (_, token), *others = run
        text = escape(token.text + "".join(other.text for _, other in others), quote=False)
        title = f"depth {token.depth}" + ("" if token.nll is None else f", NLL {token.nll:.2f} nats")
        if text:
            marked = re.sub("[\n\t]", lambda found: _MARKED[found[0]], text)
            yield f'<span class="d{token.depth}" title="{title}">{marked}</span>'


def _legend(depth: Tensor, steps: int) -> str:
    swatches = " ".join(f'<span class="d{i}">{i}</span>' for i in range(1, steps + 1))
    real = depth[depth > 0].double()
    mean = f", {real.mean():.2f} on average" if len(real) else ""
    return f"Iterations run: {swatches}{mean}"
