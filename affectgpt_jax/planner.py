"""What an update of a config takes on devices that are not here: memory, time, layouts.

The real model and optimizer, traced and compiled from shapes alone. Only attention is replaced by
what its kernel on the planned device would save (`memory.kernel_stand_in`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh
from ml_collections import ConfigDict

from affectgpt_jax import build
from affectgpt_jax.common.trees import nbytes
from affectgpt_jax.config import ConfigError
from affectgpt_jax.data.packing import Bucket
from affectgpt_jax.data.pipeline import empty_batch
from affectgpt_jax.models.affectgpt import Batch
from affectgpt_jax.models.attention import CausalAttention, Choice, causal, choose, grouped
from affectgpt_jax.models.flops import Flops, train_flops
from affectgpt_jax.program import make_program
from affectgpt_jax.training import memory, roofline, sharding
from affectgpt_jax.training.collectives import Collective
from affectgpt_jax.training.devices import Device
from affectgpt_jax.training.losses import LossFunction, cross_entropy
from affectgpt_jax.training.memory import Memory
from affectgpt_jax.training.roofline import Shape, Sizes, StepTime
from affectgpt_jax.training.step import State

FRAMES = 8  # of a clip's features, as the extractors make them
# Layouts whose times differ by less count as equal, and the simpler one is better.
SAME_TIME = 1.01


class Layout(NamedTuple):
    """One way to run an update, and what it takes.

    Attributes:
        shape: of the mesh.
        microbatches: of a batch (`config.gradient_accumulation_steps`).
        rows: that a device runs at a time.
        remat: the rematerialisation policy.
        memory: of a device.
        fits: whether it does.
        time: of an update.
    """

    shape: Shape
    microbatches: int
    rows: int
    remat: str
    memory: Memory
    fits: bool
    time: StepTime

    @property
    def batch_size(self) -> int:
        return self.rows * self.microbatches * self.shape.data * self.shape.fsdp

    @property
    def flags(self) -> str:
        """As training is told."""
        axes = [f"{axis}:{size}" for axis, size in self.shape._asdict().items() if size > 1]
        flags = f"--config.mesh={','.join(axes) or 'data:1'} --config.remat={self.remat}"
        return flags + (
            f" --config.gradient_accumulation_steps={self.microbatches}"
            if self.microbatches > 1
            else ""
        )


class Planner:
    """The abstract update of a config on one kind of device.

    Args:
        config: as training reads it.
        device: the GPU to plan for.
        rows: the shape of every row.
        efficiency: share of the device's peaks to expect.
        loss: what is minimised.
        by_token: float32 arrays of a batch, `[B, S]`, that the loss reads beside the usual ones.
        shared_prompts: whether rows hold a prompt and several answers to it, `attention.grouped`.

    Raises:
        ConfigError: values that cannot be run.
        WeightsError: a base that the decoder does not compute.
    """

    def __init__(
        self,
        config: ConfigDict,
        device: Device,
        rows: Bucket,
        efficiency: float,
        *,
        loss: LossFunction = cross_entropy,
        by_token: Sequence[str] = (),
        shared_prompts: bool = False,
    ):
        self.config, self.device, self.rows = config, device, rows
        self.by_token, self._shared_prompts = by_token, shared_prompts
        self.llm = build.base_config(config.llm)
        self._efficiency = efficiency
        fusion = build.check_model(config, self.llm, device.compute_capability)[1]
        self.features = {name: (FRAMES, fusion.feature_width(name)) for name in fusion.inputs}
        # The layouts decide the policy; attention becomes a stand-in where it is traced.
        unchosen = ConfigDict(config)
        unchosen.remat = "none"
        self.program = make_program(
            unchosen,
            abstract_mesh(Shape(1, 1, 1)),
            {rows.length: self.batch(config.batch_size)},
            loss,
            llm=self.llm,
            attend=causal,
        )
        # JAX takes this share of a GPU (xla_options), and programs are planned for a share of that.
        self.limit = int(0.9 * device.memory)
        self.abstract = functools.cache(self._abstract)
        self._saved = functools.cache(self._saved_by_a_row)

    def attention(self, tensor: int) -> Choice:
        """The backend of an update; see `backend`."""
        if self._shared_prompts:
            return Choice("xla", "answers share their prompts", grouped)
        return self.backend(tensor)

    def backend(self, tensor: int) -> Choice:
        """The attention backend that training would choose on the device.

        Args:
            tensor: devices that share the heads.

        Raises:
            ConfigError: `config.attention` names one that cannot be used.
        """
        llm, config = self.llm, self.config
        where = ("cuda", self.device.compute_capability, llm.head_dim, config.dtype)
        try:
            return choose(
                config.attention,
                *where,
                config.pack_length > 0,
                kv_heads_split=build.kv_heads_split(llm, tensor),
            )
        except ValueError as error:
            raise ConfigError(f"config.{error}; config.attention=auto takes what can") from None

    def _abstract(self, shape: Shape) -> tuple[State, Any]:
        """Shapes and shardings of state and base on a mesh of this shape."""
        program = self.program.on(abstract_mesh(shape))
        return program.state, program.base

    def batch(self, rows: int) -> Batch:
        """An abstract batch of so many rows (layout: `models.affectgpt`)."""
        more = {
            name: jax.ShapeDtypeStruct((rows, self.rows.targets), jnp.float32)
            for name in self.by_token
        }
        return jax.eval_shape(lambda: empty_batch(rows, self.rows, self.features)) | more

    def _traced_attention(self, tensor: int) -> CausalAttention:
        """What stands for the backend where it is traced: plain XLA's stands for itself."""
        choice = self.attention(tensor)
        if choice.name == "xla":
            return choice.attend
        return memory.kernel_stand_in(choice.name, self.rows.clips)

    def _saved_by_a_row(self, tensor: int) -> dict[str, int]:
        """Bytes of one row that each of `tensor` devices saves, by policy; several rows save as
        many times that."""
        mesh = abstract_mesh(Shape(1, 1, 1))
        program = self.program.on(mesh, attend=self._traced_attention(tensor))
        found = memory.saved_activations(
            program.model,
            self.batch(1),
            program.loss,
            tensor,
            self.device.compute_capability,
        )
        return dict(found)

    def memory(self, shape: Shape, rows: int, remat: str) -> Memory:
        """What an update takes on a device that runs so many rows at a time."""
        state, base = self.abstract(shape)
        saved = self._saved(shape.tensor)
        work = memory.work_bytes(
            self.program.model,
            rows,
            self.rows.length,
            self.rows.targets,
            rows * (saved["none"] - saved[remat]),
            shape.tensor,
            self.attention(shape.tensor).name == "xla",
        )
        return memory.of_update(state, base, rows * saved[remat], work)

    def fits(self, needed: Memory) -> bool:
        return needed.total <= memory.USABLE * self.limit

    def flops(self) -> Flops:
        """Of one row, forward and backward; a packed row is counted as a single sample."""
        return train_flops(
            self.llm, self.program.model.decoder.lora, self.rows.length, self.rows.targets
        )

    def sizes(self, rows: int, microbatches: int, length: int | None = None) -> Sizes:
        """What an update's collectives follow from; `length` of its rows may be another one."""
        state, base = self.abstract(Shape(1, 1, 1))
        itemsize = jnp.dtype(self.config.dtype).itemsize
        kernels = [
            part["kernel"]
            for layer in base["layers"]
            for part in layer.values()
            if "kernel" in part
        ]
        return Sizes(
            layers=nbytes(kernels),
            lm_head=nbytes(base.get("lm_head", base["embed_tokens"])),
            adapters=nbytes(state["trainable"]["lora"]),
            fusion=nbytes(state["trainable"]["fusion"]),
            hidden=rows * (length or self.rows.length) * self.llm.hidden_size * itemsize,
            num_layers=self.llm.num_hidden_layers,
            microbatches=microbatches,
        )

    def layout(
        self,
        shape: Shape,
        microbatches: int,
        rows: int,
        remat: str = "auto",
        sent: Sequence[Collective] | None = None,
    ) -> Layout:
        """What one way to run an update takes.

        Args:
            shape: of the mesh.
            microbatches: of a batch.
            rows: that a device runs at a time.
            remat: the policy; "auto" is the first of `memory.tried_by_auto` that fits, or the last
                one.
            sent: the collectives of an update; those of the formulas if None.
        """
        if remat == "auto":
            tried = memory.tried_by_auto(self.rows.clips > 1)
            fitting = (p for p in tried if self.fits(self.memory(shape, rows, p)))
            remat = next(fitting, memory.POLICIES[-1])
        needed = self.memory(shape, rows, remat)
        # What is not saved is written and read all the same when it is computed again.
        everything = rows * self._saved(shape.tensor)["none"]
        activations = everything + (needed.saved if remat != "none" else 0)
        if sent is None:
            sent = roofline.model_collectives(self.sizes(rows, microbatches), shape, remat)
        executed = microbatches * rows * roofline.executed_flops(self.flops(), remat) / shape.tensor
        traffic = roofline.memory_traffic(
            self.llm,
            weights=needed.base * shape.fsdp,
            gathered=shape.fsdp > 1,
            state=needed.state,
            activations=microbatches * activations,
            targets=microbatches * rows * self.rows.targets,
            passes=microbatches * (3 if remat == "full" else 2),
        )
        time = StepTime(
            compute=executed / roofline.matmul_peak(self.device, self.config.dtype),
            memory=traffic / self.device.hbm,
            network=roofline.network_time(sent, shape, self.device),
            efficiency=self._efficiency,
        )
        return Layout(shape, microbatches, rows, remat, needed, self.fits(needed), time)

    def lower(self, mesh: Mesh, remat: str, *, stand_in: bool = True) -> jax.stages.Lowered:
        """The real train step, lowered for a mesh of devices that are not here.

        Args:
            mesh: emulated devices, or GPUs to compile for.
            remat: the policy.
            stand_in: whether attention is replaced by what its kernel would save, without which
                only GPUs can be compiled for.
        """
        tensor = mesh.shape["tensor"]
        if stand_in:
            attend = self._traced_attention(tensor)
        else:
            attend = self.attention(tensor).for_rows_of(self.rows.clips)
        return self.program.on(mesh, remat=remat, attend=attend).lower(self.rows.length)

    def curve(self, asked: Layout, counts: Sequence[int], remat: str) -> list[Layout]:
        """The same rows on each of more or fewer devices, under a policy or "auto".

        More devices make the data axis longer, fewer the others shorter. A number that the layout
        cannot use is left out.
        """
        found = []
        for devices in counts:
            tensor = min(asked.shape.tensor, devices)
            fsdp = min(asked.shape.fsdp, devices // tensor)
            if devices % (tensor * fsdp) == 0:
                shape = Shape(devices // (tensor * fsdp), fsdp, tensor)
                found.append(self.layout(shape, asked.microbatches, asked.rows, remat))
        return found

    def candidates(self, devices: int, batch_size: int, tensor: int) -> Iterator[Layout]:
        """Ways to run a batch on so many devices, the simplest first.

        Args:
            devices: of the mesh.
            batch_size: rows of an update.
            tensor: also tried beside 1.
        """
        for shape in _shapes(devices, tensor):
            shares = shape.data * shape.fsdp
            for microbatches in range(1, batch_size // shares + 1):
                if batch_size % (shares * microbatches) == 0:
                    rows = batch_size // (shares * microbatches)
                    for remat in memory.tried_by_auto(self.rows.clips > 1):
                        yield self.layout(shape, microbatches, rows, remat)

    def recommend(self, devices: int, batch_size: int, tensor: int) -> Layout | None:
        """The fastest way that fits, the simplest of those that are as fast; None if none fits."""
        fitting = [c for c in self.candidates(devices, batch_size, tensor) if c.fits]
        if not fitting:
            return None
        fastest = min(layout.time.expected for layout in fitting)
        return next(c for c in fitting if c.time.expected <= SAME_TIME * fastest)

    def most_rows(self, shape: Shape, remat: str) -> int:
        """Rows that a device has room for at a time; 0 if not even one."""
        fewest, most = 0, 1
        while self.fits(self.memory(shape, most, remat)):
            fewest, most = most, 2 * most
        while most - fewest > 1:
            middle = (fewest + most) // 2
            if self.fits(self.memory(shape, middle, remat)):
                fewest = middle
            else:
                most = middle
        return fewest


def abstract_mesh(shape: Shape) -> AbstractMesh:
    """A mesh of this shape, of devices that are not here."""
    return AbstractMesh(shape, sharding.AXES, axis_types=(AxisType.Auto,) * len(shape))


def _shapes(devices: int, tensor: int) -> Iterator[Shape]:
    for split in sorted({1, tensor}):
        fsdp = 1
        while devices % (split * fsdp) == 0:
            yield Shape(devices // (split * fsdp), fsdp, split)
            fsdp *= 2
