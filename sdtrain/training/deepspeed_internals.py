"""All that training uses of DeepSpeed's internals; no other module touches them.

Another version may flatten parameters in another order, check overflow elsewhere or rename an attribute, and train on
silently. So one version is pinned and checked at the start, and all uses are listed (`missing`) and tested.
"""

from __future__ import annotations

import inspect
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from typing import Any

import torch

from sdtrain.errors import UserError

TESTED_VERSION = "0.19.8"
"""As pinned in pyproject.toml and requirements.lock."""

_METHODS: Mapping[str, tuple[str, ...]] = {
    "step": ("self", "closure"),
    "check_overflow": ("self", "partition_gradients"),
    "scaled_global_norm": ("self", "norm_type"),
    "_update_scale": ("self", "has_overflow"),
    "update_lp_params": ("self",),
}
_ATTRIBUTES = (
    "_grad_acc_hooks",
    "bit16_groups",
    "bit16_groups_flat",
    "check_grad_overflow",
    "clip_grad",
    "cpu_offload",
    "dp_process_group",
    "dtype",
    "gradient_accumulation_dtype",
    "ipg_buckets",
    "loss_scale",
    "loss_scaler",
    "optimizer",
    "overflow",
    "parallel_partitioned_bit16_groups",
    "param_groups",
    "partition_gradients",
    "reduce_scatter",
    "round_robin_bit16_offsets",
    "single_partition_of_fp32_groups",
    "use_grad_accum_attribute",
    "use_separate_grad_accum",
)
_MASK, _MASK_TAKES = "mask_nan_or_inf_with_val_inplace", ("input", "device", "val")
_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_SCALER = (*_SCALER_STATE, "min_scale", "update_scale")
_OURS = "sdtrain.training.deepspeed_internals relies on it"


def missing(optimizer: Any) -> list[str]:
    """Describes each attribute that DeepSpeed's ZeRO-1/2 optimizer should have and lacks."""
    kind = type(optimizer)
    said = []
    for name, expected in _METHODS.items():
        method = getattr(kind, name, None)
        if not callable(method):
            said.append(f"{kind.__name__} has no method {name}; {_OURS}.")
        elif (found := tuple(inspect.signature(method).parameters)) != expected:
            said.append(f"{kind.__name__}.{name} takes {', '.join(found)}, not {', '.join(expected)}; {_OURS}.")
    said += [f"{kind.__name__} has no attribute {name}; {_OURS}." for name in _absent(optimizer, _ATTRIBUTES)]
    scaler = getattr(optimizer, "loss_scaler", None)
    wanted = () if scaler is None else _SCALER if getattr(scaler, "dynamic", True) else ("dynamic", "cur_scale")
    return said + [f"{type(scaler).__name__} has no attribute {name}; {_OURS}." for name in _absent(scaler, wanted)]


def changed_functions(module: Any) -> list[str]:
    """Reports a changed function of ZeRO-1/2's `module` that `_mask_nonfinite` replaces."""
    found = getattr(module, _MASK, None)
    if found is None:
        return [f"{module.__name__} has no function {_MASK}; {_OURS}."]
    if found is not _mask_nonfinite and (takes := tuple(inspect.signature(found).parameters)) != _MASK_TAKES:
        return [f"{_MASK} takes {', '.join(takes)}, not {', '.join(_MASK_TAKES)}; {_OURS}."]
    return []


def _mask_nonfinite(norm: torch.Tensor, device: Any = None, val: float = -1.0) -> None:
    """Replaces DeepSpeed's, which creates a tensor on the device and so makes the host wait in each step."""
    norm.masked_fill_(~torch.isfinite(norm), val)


def _absent(thing: Any, names: Iterable[str]) -> list[str]:
    return [name for name in names if not hasattr(thing, name)]


def require_tested_version() -> None:
    """Raises UserError if another DeepSpeed than the tested version is installed."""
    found = version("deepspeed")
    if found.partition("+")[0] != TESTED_VERSION:  # a build of one's own has +COMMIT
        raise UserError(
            f"DeepSpeed {found} is installed, but sdtrain works on the internals of {TESTED_VERSION}, which other "
            f"versions change. pip install deepspeed=={TESTED_VERSION}"
        )


def import_deepspeed() -> Any:
    """Imports DeepSpeed quietly, on the CPU if there is no GPU; it selects the device on import."""
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    newer_names = "`torch.distributed.(all_gather_into_tensor|reduce_scatter_tensor)`"
    warnings.filterwarnings("ignore", newer_names, FutureWarning)
    # Its shared-memory all-reduce for CPU ranks would be compiled on first use (20 s, needs g++); gloo does as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class ZeroInternals:
    """DeepSpeed's optimizer for ZeRO-1 and 2; UserError for another optimizer, or other internals.

    `master` is this rank's flat part of the fp32 weights. `network` has the network's own weights, flat and padded, and
    its `parameters` are views of it, in its order; `offsets` are their starts. `group` has all ranks.
    """

    def __init__(self, engine: Any):
        from deepspeed.runtime.zero import stage_1_and_2

        zero = engine.optimizer
        if not isinstance(zero, stage_1_and_2.DeepSpeedZeroOptimizer):
            raise UserError(
                f"DeepSpeed took {type(zero).__name__} in the place of ZeRO-1 or 2, which checkpoints are made of. "
                "Remove from --deepspeed_config what asks for it."
            )
        if said := missing(zero) + changed_functions(stage_1_and_2):
            raise UserError(f"DeepSpeed {version('deepspeed')} is not the tested one. {' '.join(said)}")
        stage_1_and_2.mask_nan_or_inf_with_val_inplace = _mask_nonfinite
        self._zero: Any = zero
        self.master: torch.Tensor = zero.single_partition_of_fp32_groups[0]
        self.offsets: list[int] = zero.round_robin_bit16_offsets[0]
        if len(zero.bit16_groups) != 1 or self.master.dtype is not torch.float32:
            raise UserError(
                "Training needs one group of parameters with fp32 weights; --deepspeed_config changes that."
            )
        self.network: torch.Tensor = zero.bit16_groups_flat[0]
        self.parameters: list[torch.nn.Parameter] = zero.bit16_groups[0]
        self.group: Any = zero.dp_process_group

    @property
    def network_part(self) -> torch.Tensor:
        """The part of `network` that belongs to `master`."""
        parts: list[torch.Tensor] = self._zero.parallel_partitioned_bit16_groups[0]
        return parts[torch.distributed.get_rank(self.group)].detach()

    def gather_network(self) -> None:
        """Fills `network` with the parts of all ranks, who all take part.

        Gloo's all-gather takes three times the processor time of a broadcast for each part.
        """
        parts = self._zero.parallel_partitioned_bit16_groups[0]
        if len(parts) == 1:
            return
        if torch.distributed.get_backend(self.group) == "nccl":
            torch.distributed.all_gather_into_tensor(self.network, self.network_part, self.group)
            return
        for rank, part in enumerate(parts):
            torch.distributed.broadcast(part.detach(), group=self.group, group_src=rank)

    @property
    def max_grad_norm(self) -> float:
        """The norm to which gradients are clipped; 0: they are not."""
        return float(self._zero.clip_grad)

    def release_gradients(self) -> None:
        """Takes DeepSpeed's hooks off the parameters: from now on their gradients are somebody else's."""
        for hook in self._zero._grad_acc_hooks:
            hook.remove()
        self._zero._grad_acc_hooks.clear()

    @property
    def adam(self) -> torch.optim.Optimizer:
        """The optimizer of `master`."""
        optimizer: torch.optim.Optimizer = self._zero.optimizer
        return optimizer

    @property
    def is_bf16(self) -> bool:
        """Whether the network's own weights are bf16."""
        return bool(self._zero.dtype is torch.bfloat16)

    def add_up_in_fp32(self) -> None:
        """Accumulates and reduces gradients in float32; call it before the first backward pass.

        `communication_data_type` covers the reduction. ZeRO-1 with bf16 needs the rest here: configured for float32,
        DeepSpeed would switch to an optimizer without the partitions that checkpoints consist of. UserError if
        --deepspeed_config contradicts it.
        """
        zero = self._zero
        if not zero.partition_gradients:
            zero.gradient_accumulation_dtype = torch.float32
            zero.use_separate_grad_accum = zero.use_grad_accum_attribute = True
        divides_before_cast = zero.partition_gradients and zero.reduce_scatter and zero.dtype is not torch.float32
        dtypes = {zero.gradient_accumulation_dtype, *zero.ipg_buckets}
        if dtypes != {torch.float32} or zero.cpu_offload or divides_before_cast:
            raise UserError(
                "speed.fp32_gradients does not hold with this --deepspeed_config, which offloads, scatters or casts "
                "gradients (offload_optimizer, reduce_scatter, torch_autocast). Remove that there, or set "
                "speed.fp32_gradients to false."
            )

    def before_each_step(self, listener: Callable[[torch.Tensor], None]) -> None:
        """Passes the gradient's norm over all ranks, on the device, to `listener` before each step.

        It includes all micro-steps, so a NaN or infinity in any of them, on any rank, shows.
        """
        norm_of = self._zero.scaled_global_norm

        def scaled_global_norm(norm_type: int = 2) -> Any:
            norm = norm_of(norm_type)
            listener(norm)
            return norm

        self._zero.scaled_global_norm = scaled_global_norm

    def ask_before_each_step(self, may_apply: Callable[[float], bool], is_overflow: Callable[[], bool]) -> None:
        """Asks before every step whether it may be applied; a refused one changes nothing on any rank.

        The only such hook is `check_overflow`, after gradients are reduced. DeepSpeed's reads all gradients again; ours
        takes their norm, which `step` computes anyway. `may_apply` gets it without the loss scale; `is_overflow` tells
        whether the last refusal was for a gradient that is not finite.
        """
        zero, norm_of = self._zero, self._zero.scaled_global_norm
        judged: list[torch.Tensor] = []

        def check_overflow(partition_gradients: bool = True) -> None:
            judged[:] = [norm_of()]
            zero.overflow = not may_apply(float(judged[0]) / zero.loss_scale)

        def update_scale(has_overflow: bool = False) -> None:
            self.update_loss_scale(has_overflow and is_overflow())  # a spike is not the scaler's business

        zero.check_grad_overflow, zero.check_overflow = True, check_overflow
        zero.scaled_global_norm = lambda norm_type=2: judged[0]
        zero._update_scale = update_scale

    @property
    def can_rescale(self) -> bool:
        """Whether there is a loss scaler that can still lower its scale."""
        scaler = self._zero.loss_scaler
        return bool(scaler.dynamic and scaler.cur_scale > scaler.min_scale)

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied by before the backward pass; 1 but in fp16."""
        return float(self._zero.loss_scale)

    def update_loss_scale(self, has_overflowed: bool) -> None:
        """Lowers a dynamic loss scale after an overflow, raises it after many steps without."""
        if self._zero.loss_scaler.dynamic and (self.can_rescale or not has_overflowed):
            self._zero.loss_scaler.update_scale(has_overflowed)  # one at its minimum would raise a bare Exception

    @property
    def loss_scaler(self) -> dict[str, float]:
        """State of the dynamic loss scaler; empty where there is none."""
        scaler = self._zero.loss_scaler
        return {name: getattr(scaler, name) for name in _SCALER_STATE} if scaler.dynamic else {}

    @loss_scaler.setter
    def loss_scaler(self, state: Mapping[str, float]) -> None:
        if self._zero.loss_scaler.dynamic:
            vars(self._zero.loss_scaler).update(state)

    def refresh_network(self) -> None:
        """Copies `master` into the network's own weights. All ranks take part."""
        self._zero.update_lp_params()
