"""What `ctxprune.json` of a model folder and the metadata of an adapter say, in types."""

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, with_config
from pydantic.dataclasses import dataclass
from typing_extensions import TypedDict

from ctxprune.pruner.config import PruneConfig
from ctxprune.pruner.schema import STRICT, Settings

# A run of `tune` as it was told, by this version or an earlier one.
Run = dict[str, Any]


@with_config(STRICT)
class Provenance(TypedDict, total=False):
    """Where a model comes from.

    Attributes:
        base: what was converted. origin: what its card says.
        tune: the last run. earlier: those before it.
        gates_of: the run that the gates are of, without its LoRA.
        averaged_with: whose weights are in the mean.
        non_finite: the weights hold NaN or infinity, as somebody asked for.
    """

    base: str
    origin: dict[str, str | list[str]]
    tune: Run
    earlier: list[Run]
    gates_of: Run | None
    averaged_with: list["Provenance"]
    non_finite: bool


Config = Annotated[
    PruneConfig,
    BeforeValidator(
        lambda raw: raw if isinstance(raw, PruneConfig) else PruneConfig.from_mapping(raw, "config")
    ),
]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FolderSettings(Settings):
    """`ctxprune.json`.

    Attributes:
        format: of the file. version: of ctxprune that wrote it.
        config: of the gates. layers: what the model's are, in words.
    """

    format: Literal[1] = 1
    version: str | None = None
    config: Config
    layers: str = ""
    provenance: Provenance = field(default_factory=lambda: Provenance())


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AdapterSettings(Settings):
    """The metadata of an adapter.

    Attributes:
        config: of the gates. lora_rank: of the matrices beside them; 0: there are none.
    """

    config: Config
    provenance: Provenance = field(default_factory=lambda: Provenance())
    lora_rank: Annotated[int, Field(ge=0, le=2**20)]
