"""From a checkpoint to a running model: each tensor is read, decoded to the model's dtype, and put in its place.

An int4 checkpoint stays what it is on a CPU with kernels (`model/packed/`). In every other case, whatever the file has
(bf16, fp8 blocks, int4 groups), the model holds dense weights of one dtype; routed experts go into their layer's stacks
one by one. Peak memory is the model and one tensor.
"""

from pathlib import Path

import torch

from karakoram.checkpoint import Checkpoint, open_checkpoint
from karakoram.env import bundled_model_dir, memory
from karakoram.errors import CheckpointError, InputError
from karakoram.model.packed.assemble import CheckpointWeights, assemble, can_run_packed
from karakoram.model.transformer import Transformer

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
DEVICES = ("cpu", "cuda")


def load_model(
    path_or_hub_id: str | Path | Checkpoint | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "bfloat16",
    allow_config_keys: tuple[str, ...] = (),
    dense: bool = False,
    routed_experts: bool = True,
) -> Transformer:
    """Load a K2-shaped checkpoint for inference; None is the bundled nano.

    An opened checkpoint is taken as it is, checked by who opened it.
    dtype is bfloat16 or float32; dense decodes int4 weights even where kernels could use them as they are. Without
    routed_experts, each layer's experts are a `FedBank` that an expert store feeds; only on the kernels. Raises
    CheckpointError (missing or damaged files, too little memory), ConfigError (another architecture, unknown settings),
    InputError (device or dtype that is not there).
    """
    wanted = _dtype(dtype)
    place = _device(device)
    if isinstance(path_or_hub_id, Checkpoint):
        checkpoint = path_or_hub_id
    else:
        checkpoint = open_checkpoint(path_or_hub_id or bundled_model_dir(), allow_config_keys)
        checkpoint.check()
    model = Transformer(checkpoint.config, device="meta", dtype=wanted)
    if not dense and can_run_packed(checkpoint, place, wanted):
        _refuse_too_large(stored_bytes(checkpoint, routed_experts), wanted, place, checkpoint.dir)
        assemble(model, CheckpointWeights(checkpoint), routed_experts)
        return model.eval().requires_grad_(False)
    if not routed_experts:
        raise InputError(
            f"{checkpoint.dir} cannot run with its experts elsewhere on {place} as {wanted}.",
            "That needs the CPU kernels (`k2 doctor`), bfloat16, and a checkpoint they can run.",
        )
    _refuse_too_large(
        sum(t.numel() * t.element_size() for t in model.state_dict().values()), wanted, place, checkpoint.dir
    )
    model.to_empty(device=place)
    fill(model, checkpoint)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def fill(model: Transformer, checkpoint: Checkpoint) -> None:
    """Copy every weight of a checkpoint into a model of its shape."""
    for name, tensor in model.state_dict(keep_vars=False).items():
        stack, _, projection = name.rpartition(".experts.")
        if stack:
            layer = int(stack.split(".")[2])
            for expert in range(tensor.shape[0]):
                tensor[expert].copy_(checkpoint.expert(layer, expert, projection, tensor.dtype))
        elif name.endswith(".weight"):
            tensor.copy_(checkpoint.read_weight(name, tensor.dtype))
        else:
            tensor.copy_(checkpoint.read(name))


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    wanted = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if wanted is None or wanted not in DTYPES.values():
        raise InputError(f"A model cannot be loaded as {dtype}.", f"Choose one of {', '.join(DTYPES)}.")
    return wanted


def _device(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
        if place.type in DEVICES:
            torch.empty(0, device=place)
            return place
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(
            f"There is no device {str(device)!r} here.", "`k2 doctor` lists what there is; cpu always works."
        ) from error
    raise InputError(f"A model cannot be loaded to device {str(device)!r}.", f"Choose one of {', '.join(DEVICES)}.")


def stored_bytes(checkpoint: Checkpoint, routed_experts: bool = True) -> int:
    """Bytes of all tensors that belong to the model, or of all but its routed experts."""
    return sum(
        entry.nbytes
        for name, entry in checkpoint.tensors.items()
        if routed_experts or ".mlp.experts." not in name  # of a quantized weight there are several tensors
    )


def _refuse_too_large(needed: int, dtype: torch.dtype, place: torch.device, source: Path) -> None:
    available = memory().available_bytes if place.type == "cpu" else torch.cuda.mem_get_info(place)[0]
    if available is not None and needed > available:
        raise CheckpointError(
            f"{source} needs {needed / 1e9:,.1f} GB as {dtype}, but only {available / 1e9:,.1f} GB are free "
            f"on {place}.",
            "Take a smaller model; `k2 inspect` tells what a checkpoint needs.",
        )
