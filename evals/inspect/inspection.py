"""What `ctxprune inspect` shows: traces of one text, and what they say about its tokens."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass as checked
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ctxprune.evals.inspect.kinds import Kind, dropping_of, kinds_of, survival_of, survival_over_age
from ctxprune.evals.inspect.trace import Trace, overlap, pieces_of, trace
from ctxprune.evals.provenance import provenance
from ctxprune.pruner.checkpoints.checkpoint import load_off, load_tokenizer, read_config
from ctxprune.pruner.config import Policy
from ctxprune.pruner.device import AUTO, place
from ctxprune.pruner.errors import CtxpruneError
from ctxprune.pruner.schema import STRICT, Level, Name, Seed, Settings, Tokens

PACKAGES = ("ctxprune", "torch", "transformers")
MOST_VIEWS = 4


@checked(frozen=True, config=STRICT)
class Subject(Settings):
    """What is looked at: a policy at a sparsity, in a model or in the one that is inspected."""

    policy: Policy
    sparsity: Level | None
    model: Path | None = None

    @classmethod
    def parse(cls, text: str) -> "Subject":
        """`POLICY[:SPARSITY][@MODEL]`, as in `gate`, `sink:0.8` or `gate:0.5@./other`.

        Raises:
            CtxpruneError: something else.
        """
        what, _, model = text.partition("@")
        policy, _, sparsity = what.partition(":")
        try:
            level = float(sparsity) if sparsity else None
        except ValueError as error:
            raise CtxpruneError(
                f"`{sparsity}` of `{text}` is no sparsity", "write it like `sink:0.8`"
            ) from error
        return cls(policy=policy, sparsity=level, model=Path(model) if model else None)


@checked(frozen=True, config=STRICT)
class InspectConfig(Settings):
    """What is inspected.

    Attributes:
        subjects: one view each. tokens: of the text, at most.
        dtype, device, device_map: of the model, see `checkpoint.load`. seed: of the intervals.
    """

    subjects: tuple[Subject, ...] = (Subject("gate", None),)
    tokens: Tokens = 1000
    dtype: Name = AUTO
    device: Name = AUTO
    device_map: Name | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        place(self.device, self.dtype, self.device_map)
        if len(self.subjects) > MOST_VIEWS:
            raise CtxpruneError(
                f"{len(self.subjects)} views do not fit side by side", f"give {MOST_VIEWS} at most"
            )


@dataclass(frozen=True)
class View:
    """A trace, and what it says.

    Attributes:
        label: names it among the others.
        kinds: which kinds of tokens stay.
        survival: age in tokens -> share of layers and tokens that are still visible at that age.
        dropping: (group, kind) -> how much oftener than its share of the text a kind is what other
            tokens leave for.
    """

    label: str
    trace: Trace
    kinds: list[Kind]
    survival: dict[int, float]
    dropping: dict[tuple[str, str], float]


def inspect(
    folder: Path,
    text: str,
    config: InspectConfig,
    on_event: Callable[[str], None] | None = None,
) -> list[View]:
    """Trace a text for every subject.

    Args:
        folder: the model of the subjects that name none. text: only its beginning is read.
        on_event: called with one line of text when a subject's turn comes.

    Raises:
        CtxpruneError: bad input.
    """
    say = on_event or (lambda line: None)
    views: list[View] = []
    kept: tuple[Path, PreTrainedModel, PreTrainedTokenizerBase] | None = None
    for subject in config.subjects:
        path = subject.model or folder
        if kept is None or kept[0] != path:
            where = place(config.device, config.dtype, config.device_map)
            model = load_off(path, where, say)
            kept = path, model, load_tokenizer(path)
        _, model, tokenizer = kept
        sparsity = read_config(path).tuned if subject.sparsity is None else subject.sparsity
        ids, pieces = pieces_of(tokenizer, text, config.tokens)
        label = f"{subject.policy} {sparsity:g}" if sparsity else "dense"
        say(f"{label}: reading {len(ids)} tokens")
        found = trace(model, ids, pieces, subject.policy, sparsity, name=path.resolve().name)
        views.append(View(_apart(label, path, views), found, *_told(found, config.seed)))
    return views


def _apart(label: str, path: Path, views: list[View]) -> str:
    """The label, with its model or a number behind it if there is one like it."""
    taken = {view.label for view in views}
    named = label if label not in taken else f"{label}, {path.name}"
    return named if named not in taken else f"{named} ({len(views) + 1})"


def _told(
    found: Trace, seed: int
) -> tuple[list[Kind], dict[int, float], dict[tuple[str, str], float]]:
    masks = kinds_of(found.pieces)
    kinds = survival_of(found.expires, masks, seed=seed)
    ages = sorted({round(2 ** (step / 2)) for step in range(40)})
    ages = [age for age in ages if age < found.tokens]
    survival = dict(zip(ages, survival_over_age(found.expires, ages), strict=True))
    return kinds, survival, dropping_of(found.dropper, masks)


def page_data(views: list[View], title: str) -> dict[str, Any]:
    """What the page and `--json` tell: the traces token by token, and all that follows."""
    about = provenance(*PACKAGES)
    return {
        "title": title,
        "command": about["command"],
        "created": about["date"],
        "versions": about["versions"],
        "views": [_view(view) for view in views],
    }


def _view(view: View) -> Mapping[str, Any]:
    found = view.trace
    return {
        "label": view.label,
        "model": found.model,
        "policy": found.policy,
        "requested": found.requested,
        "sparsity": found.sparsity,
        "evicts_every": found.evicts_every,
        "layers": found.layers,
        "tokens": found.tokens,
        "dense": found.policy == "dense",
        "pieces": list(found.pieces),
        "expires": found.expires.tolist(),
        "dropper": found.dropper.tolist(),
        "attention": found.attention.tolist(),
        "kinds": [asdict(kind) for kind in view.kinds],
        "dropping": [
            {"group": group, "kind": kind, "lift": lift}
            for (group, kind), lift in view.dropping.items()
        ],
        "survival": {"age": list(view.survival), "share": list(view.survival.values())},
    }


def rich_kinds(views: list[View]) -> Table:
    """Which kinds of tokens stay, and for which others leave, for a terminal."""
    shares = ", ".join(f"{view.label} {view.trace.sparsity:.3f}" for view in views)
    caption = (
        "Share of later queries that still see a token (95% interval), and how much oftener than "
        f"its share of the text a category is what others leave for; sparsity: {shares}"
    )
    first = views[0]
    for view in views[1:]:
        if view.trace.expires.shape == first.trace.expires.shape:
            alike = overlap(first.trace, view.trace)
            caption += f"\n{alike:.1%} of what {first.label} or {view.label} sees, both see"
    table = Table(caption=caption)
    for name in ("category", "group"):
        table.add_column(name)
    table.add_column("tokens", justify="right")
    for view in views:
        table.add_column(f"{view.label}: seen", justify="right")
        table.add_column("left for", justify="right")
    by_kind = [{(kind.group, kind.kind): kind for kind in view.kinds} for view in views]
    for (group, name), kind in by_kind[0].items():
        cells = []
        for view, found in zip(views, by_kind, strict=True):
            lift = view.dropping.get((group, name))
            cells += [_interval(found.get((group, name))), "" if lift is None else f"{lift:.2f}"]
        table.add_row(name, group, f"{kind.count}", *cells)
    return table


def _interval(kind: Kind | None) -> str:
    return "" if kind is None else f"{kind.kept:.3f} ({kind.low:.3f} to {kind.high:.3f})"
