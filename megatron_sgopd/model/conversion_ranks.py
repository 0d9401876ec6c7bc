"""Hugging Face <-> Megatron on this rank, a parameter or a layer at a time.

No model is held: one on the meta device (shapes without memory) says which part of which tensor
this rank has in the checkpoint, and its content passes from file to file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_saver import save as save_state_dict

from megatron_sgopd.atomic_files import begin_folder, finish_folder
from megatron_sgopd.config.schema import ParallelConfig
from megatron_sgopd.distributed.groups import Groups, from_first_rank, initialize
from megatron_sgopd.model.checkpoint_files import COMPANIONS
from megatron_sgopd.model.conversion_job import ToHf, ToMegatron
from megatron_sgopd.model.families import hf_shapes
from megatron_sgopd.model.gpt import ShardedModel, build_model, global_name
from megatron_sgopd.model.hf_reader import StoredWeights
from megatron_sgopd.model.hf_writer import ORIGIN_FILE, copy_companions, write_hf_dir
from megatron_sgopd.model.model_card import origin_json
from megatron_sgopd.model.weight_stream import iter_hf_weights, join_parts, source_of

CPU = torch.device("cpu")


def convert(job: ToMegatron | ToHf) -> None:
    """Does a checked job on this rank; collective over all of them."""
    groups = initialize(_layout(job), seed=0, device=CPU)
    if isinstance(job, ToMegatron):
        to_megatron(job, groups)
    else:
        to_hf(job, groups)


def to_megatron(job: ToMegatron, groups: Groups) -> None:
    out = Path(job.out)
    temporary = from_first_rank(begin_folder(out) if groups.rank == 0 else None)
    model = _model_on_meta_device(job, groups)
    save_weights(temporary, model, job.weights)
    dist.barrier()  # every rank's part is on disk before the name says so
    if groups.rank == 0:
        copy_companions(
            Path(job.hf), temporary / COMPANIONS, {ORIGIN_FILE: origin_json(job.origin)}
        )
        finish_folder(out)
    dist.barrier()


def to_hf(job: ToHf, groups: Groups) -> None:
    model = _model_on_meta_device(job, groups)
    shards = CheckpointShards(job.stored.path, model)
    write_hf_dir(
        Path(job.out),
        job.stored.companions,
        iter_hf_weights(model, shards.fetch),
        hf_shapes(model.hf_config),
        job.target_dtype,
        texts=job.texts() if groups.rank == 0 else None,
        max_shard_bytes=job.max_shard_bytes,
        writes=groups.rank == 0,
    )
    dist.barrier()


def _layout(job: ToMegatron | ToHf) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=job.tensor_parallel,
        pipeline_model_parallel_size=job.pipeline_parallel,
        data_parallel_size=1,
        make_vocab_size_divisible_by=job.divisible_by if isinstance(job, ToMegatron) else 1,
    )


def _model_on_meta_device(job: ToMegatron | ToHf, groups: Groups) -> ShardedModel:
    dtype = job.target_dtype if isinstance(job, ToMegatron) else job.stored.dtype
    return build_model(job.hf_config, groups, dtype=dtype, trainable=False, on_meta_device=True)


# -- to a checkpoint -------------------------------------------------------------------------------


def save_weights(folder: Path, model: ShardedModel, weights: StoredWeights) -> None:
    """Writes this rank's part into a checkpoint, each tensor read when it is written.

    `model` is on the meta device.
    """
    sharded = {f"model{i}": c.sharded_state_dict() for i, c in enumerate(model.chunks)}
    reader = _Reader(model, weights)
    dist_checkpointing.save(sharded, str(folder), sharded_strategy=_SaveAsRead(reader))


class _Reader:
    """Pieces of Megatron's parameters, from Hugging Face tensors."""

    def __init__(self, model: ShardedModel, weights: StoredWeights) -> None:
        self._model, self._weights = model, weights
        tp = model.groups.tp_size
        # Rows of embedding and head with those that pad the vocabulary.
        multiple = model.groups.config.make_vocab_size_divisible_by * tp
        self._rows = -(-model.true_vocab_size // multiple) * multiple

    def piece(self, item: WriteItem) -> Tensor:
        """Reads what a checkpoint's entry holds: a box of the parameter of all ranks together.

        Layers are stacked: the first coordinate of theirs is the layer.
        """
        assert item.tensor_data is not None, "of a tensor"
        key, chunk = item.index.fqn, item.tensor_data.chunk
        offsets, sizes = list(chunk.offsets), list(chunk.sizes)
        stacked = key.startswith("decoder.layers.")
        if stacked:
            key = key.replace("layers.", f"layers.{offsets.pop(0)}.", 1)
            assert sizes.pop(0) == 1, "a layer at a time"
        source = source_of(key, tied=self._model.hf_config.tie_word_embeddings)
        parts = [self._weights.get(name) for name in source.names]
        whole = join_parts(parts, source, self._rows, self._model.hf_config)
        for dim, (start, size) in enumerate(zip(offsets, sizes, strict=True)):
            whole = whole.narrow(dim, start, size)
        piece = whole.to(self._model.dtype).contiguous()
        return piece.unsqueeze(0) if stacked else piece


class _SaveAsRead(torch_strategies.TorchDistSaveShardedStrategy):
    """Megatron's own format by torch's own writer; Megatron's would gather all tensors first."""

    def __init__(self, reader: _Reader) -> None:
        super().__init__("torch_dist", 1)
        self._reader = reader

    def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
        flat, _, _ = torch_strategies._replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        save_state_dict(
            torch_strategies.mcore_to_pyt_state_dict(flat),
            storage_writer=FileSystemWriter(checkpoint_dir),
            planner=_LazyPlanner(self._reader),
        )


class _LazyPlanner(torch_strategies.MCoreSavePlanner):
    def __init__(self, reader: _Reader) -> None:
        super().__init__(flatten_state_dict=False)
        self._reader = reader

    def resolve_data(self, write_item: WriteItem) -> Any:
        if write_item.type == WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)
        return self._reader.piece(write_item)


# -- from a checkpoint -----------------------------------------------------------------------------


class CheckpointShards:
    """This rank's part of a checkpoint, read as it is asked for; see `weight_stream.Fetch`."""

    def __init__(self, path: Path, model: ShardedModel) -> None:
        # Megatron's own loader, on one rank, fails unless all pieces of a tensor are asked for at
        # once. Torch's reads any box of a tensor.
        self._reader = FileSystemReader(path)
        self._metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._sharded = {
            global_name(name, chunk.first_layer): sharded
            for chunk in model.chunks
            for name, sharded in chunk.sharded_state_dict().items()
        }

    def fetch(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        fetched = {}
        for name in names:
            sharded = self._sharded[name]
            if isinstance(sharded, ShardedTensorFactory):  # gate and up, stored one by one
                fetched[name] = sharded.merge_fn([self._read(part) for part in sharded.build()])
            else:
                fetched[name] = self._read(sharded)
        return fetched

    def _read(self, sharded: ShardedTensor) -> Tensor:
        """Rows that the checkpoint has not, of another padding, are zero."""
        sizes = (1,) * sharded.prepend_axis_num + tuple(sharded.local_shape)
        target = torch.zeros(sizes, dtype=sharded.dtype)
        box = ChunkStorageMetadata(torch.Size(sharded.global_offset), target.shape)
        planner = _BoxPlanner(sharded.key, box)
        planner.set_up_planner({sharded.key: target}, self._metadata, is_coordinator=True)
        self._reader.read_data(planner.create_local_plan(), planner).wait()
        return target.view(sharded.local_shape)


class _BoxPlanner(DefaultLoadPlanner):
    """Reads a box of a stored tensor, whatever pieces it was stored in."""

    def __init__(self, key: str, box: ChunkStorageMetadata) -> None:
        super().__init__()
        self._key, self._box = key, box

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None, "torch sets it up"
        stored = self.metadata.state_dict_metadata[self._key]
        assert isinstance(stored, TensorStorageMetadata), "a weight"
        return LoadPlan(create_read_items_for_chunk_list(self._key, stored, [self._box]))

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn]
