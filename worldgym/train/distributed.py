"""One process or many: DDP by default, ``fully_shard`` behind a flag; launched by torchrun."""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


class Group:
    """The processes that train together; alone, every method is the identity."""

    def __init__(self, rank: int = 0, size: int = 1, shard: bool = False,
                 device: torch.device | None = None) -> None:
        self.rank, self.size = rank, size
        self.shard = shard and size > 1
        self.device = device or torch.device("cpu")
        self._joined = False

    @classmethod
    def from_env(cls, device: str = "cpu", shard: bool = False) -> "Group":
        """Join the group that torchrun describes in the environment, if any."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls(device=torch.device(device))
        joined = not dist.is_initialized()
        where = torch.device(device)
        if where.type == "cuda":
            where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(where)
        if joined:
            dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
        group = cls(dist.get_rank(), dist.get_world_size(), shard, where)
        group._joined = joined
        return group

    def close(self) -> None:
        """Leave the group, if ``from_env`` joined it."""
        if self._joined:
            dist.destroy_process_group()
            self._joined = False

    @property
    def first(self) -> bool:
        """True on the process that writes files."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """``module`` ready for joint training; sharding changes it in place."""
        if self.size == 1:
            return module
        if self.shard:
            from torch.distributed.fsdp import fully_shard

            mesh = dist.init_device_mesh(self.device.type, (self.size,))
            for part in list(module.modules()):
                for block in getattr(part, "blocks", []):
                    fully_shard(block, mesh=mesh)
            fully_shard(module, mesh=mesh)
            return module
        return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False)

    def barrier(self) -> None:
        """Wait for the others."""
        if self.size > 1:
            dist.barrier()

    def rows(self, n: int) -> slice:
        """This process's share of a global batch of ``n`` rows."""
        return slice(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def full(self, module: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict:
        """Whole state of model and optimiser, for a checkpoint; every process must call it."""
        if self.shard:
            from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            model, optim = get_state_dict(module, optimizers, options=options)
            return {"model": model, "optimizer": optim}
        return {"model": module.state_dict(), "optimizer": [o.state_dict() for o in optimizers]}

    def load(self, module: nn.Module, optimizers: list[torch.optim.Optimizer], state: dict) -> None:
        """Inverse of ``full``."""
        if self.shard:
            from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

            set_state_dict(module, optimizers, model_state_dict=state["model"],
                           optim_state_dict=state["optimizer"],
                           options=StateDictOptions(full_state_dict=True))
            return
        module.load_state_dict(state["model"])
        for optimizer, values in zip(optimizers, state["optimizer"], strict=True):
            optimizer.load_state_dict(values)

    def average(self, value: Tensor) -> Tensor:
        """Mean of a tensor over the processes, without gradient."""
        if self.size == 1:
            return value.detach()
        out = value.detach().clone()
        dist.all_reduce(out)
        return out / self.size

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """Average of each value over the processes."""
        if self.size == 1:
            return values
        packed = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        return dict(zip(values, self.average(packed).tolist(), strict=True))


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fill(tensor: Tensor, values: Tensor) -> None:
    """Copy whole ``values`` into a tensor that may be sharded."""
    if isinstance(tensor, DTensor):
        values = distribute_tensor(values.to(tensor.device), tensor.device_mesh, tensor.placements)
    tensor.copy_(values)
