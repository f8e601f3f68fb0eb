"""Which models an engine has the arithmetic for: not every engine runs every kind of block yet."""

from __future__ import annotations

from fastigpt.spec import ModelSpec

_PLAIN = ("triton",)  # run Image GPT's blocks; the others run whatever a ModelSpec can say


def why_unsupported(engine: str, spec: ModelSpec) -> str | None:
    """A sentence that says what an engine of this name lacks for such a model, or None."""
    block = spec.block
    beyond = {
        "blocks with rotary positions": spec.positions == "rotary",
        "blocks with gated MLPs": block.mlp == "gated_silu",
        "fewer heads of keys than of queries": block.n_kv_head != block.n_head,
        "heads whose widths do not add up to the model's": block.sections[0] != spec.width,
        "image heads with a hidden layer": spec.head_inner is not None,
    }
    found = next((what for what, needed in beyond.items() if needed), None)
    if engine not in _PLAIN or found is None:
        return None
    return f"the {engine} engine does not run {found} yet; backend='portable' does"


def require(engine: str, spec: ModelSpec) -> None:
    """Raises ValueError for a model that an engine of this name cannot run."""
    reason = why_unsupported(engine, spec)
    if reason is not None:
        raise ValueError(reason)
