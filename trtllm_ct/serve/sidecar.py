"""Sidecars: small directories that TensorRT-LLM is given in place of a compressed-tensors checkpoint.

The engine's parent process parses config.json before it calls any plug-in, and raises an error for most schemes. So the
engine gets a sidecar, a directory whose configuration is in ModelOpt's form. It has no weights, because stock
TensorRT-LLM would silently load a part of them. All other files are symbolic links to the source.

The file `trtllm_ct.json` in a sidecar names the source and records the decisions of the plan. Every process plans again
from the source's headers and compares the result with this record. Planning is pure, so both must be equal.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.errors import ConfigError, Fault, SidecarError
from trtllm_ct.base.json_form import fields_form, from_fields, json_form, json_object
from trtllm_ct.base.version import __version__
from trtllm_ct.checkpoint.header import format_names
from trtllm_ct.checkpoint.side_files import side_files
from trtllm_ct.config.detect import SIDECAR_FILE, Detection
from trtllm_ct.config.json_file import read_json_object
from trtllm_ct.convert.hf_directory import rewritten_side_files, write_configuration
from trtllm_ct.pipeline.open import Checkpoint, open_checkpoint
from trtllm_ct.plan.engine_class import refuse_misread
from trtllm_ct.plan.options import PlanOptions
from trtllm_ct.plan.probe import NO_PROBE, Probe
from trtllm_ct.serve.cache import cache_root, clear_sidecars, new_sidecar_directory
from trtllm_ct.serve.hub import Repository
from trtllm_ct.serve.own_directory import contents_of, make_private, require_contents, require_own_directory

if TYPE_CHECKING:
    from collections.abc import Mapping

    from typing_extensions import Self

    from trtllm_ct.engine.parallel import Parallel
    from trtllm_ct.plan.plan import Plan

__all__ = [
    "SIDECAR_FILE",
    "Sidecar",
    "cache_root",
    "clear_sidecars",
    "is_sidecar",
    "known_sidecars",
    "make_sidecar",
    "make_sidecar_and_plan",
    "restore_sidecar",
]

_LAYOUT = 2
"""The version of the layout of `trtllm_ct.json`."""

_known: dict[str, dict[str, Any]] = {}
"""The records of the sidecars that this process made or reused, by directory."""


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """A sidecar directory and the content of its `trtllm_ct.json`.

    - `source`: the checkpoint directory that it was made from.
    - `options`: the options that it was planned with.
    - `fingerprint`: a hash of the source's config.json and headers, see `fingerprint_of`.
    - `digest`: a hash of the plan's decisions, see `digest_of`.
    - `probe`: the stored values that were read for the plan, so that no other process has to read them again.
    - `modes`: mode and reason of every quantized module, by module name.
    - `repository`: the Hugging Face repository of the source, if it was downloaded from one.
    - `contents`: what each of its other files is, see `contents_of`.
    """

    directory: Path
    source: Path
    options: PlanOptions
    fingerprint: str
    digest: str
    probe: Probe = NO_PROBE
    modes: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    repository: Repository | None = None
    contents: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, directory: str | Path) -> Self:
        """Read the `trtllm_ct.json` of a sidecar.

        Raises `SidecarError` when it is missing or damaged, when another user owns the directory or can write to it,
        and when its files are not those that were written.
        """
        path = Path(directory) / SIDECAR_FILE
        try:
            content = read_json_object(path)
            require_own_directory(Path(directory))
            sidecar = cls.from_dict(Path(directory), content)
        except ConfigError as error:
            raise SidecarError(*error.faults) from None
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise SidecarError(_damaged(path, f"{type(error).__name__}: {error}")) from error
        require_contents(Path(directory), sidecar.contents, without=SIDECAR_FILE)
        return sidecar

    @classmethod
    def from_dict(cls, directory: Path, entry: Mapping[str, Any]) -> Self:
        """Create a sidecar from the output of `to_dict` or `record`.

        Raises `AttributeError`, `KeyError`, `TypeError` or `ValueError` for anything else.
        """
        if entry["layout"] != _LAYOUT:
            raise ValueError(f"layout {entry['layout']!r}")
        missing = [name for name, value in entry.items() if value is None and name != "repository"]
        if missing:
            raise TypeError(f"null as {', '.join(missing)}")
        return from_fields(
            cls,
            {"directory": directory, **{name: entry[name] for name in entry.keys() - {"layout", "version"}}},
            source=Path,
            options=PlanOptions.from_dict,
            probe=_probe_from_dict,
            modes=_tuples,
            contents=lambda contents: dict(contents.items()),
            repository=lambda repository: from_fields(Repository, repository),
        )

    def record(self) -> dict[str, Any]:
        """Return everything that another node needs to make the sidecar again, in JSON types."""
        return json_object(
            {
                "layout": _LAYOUT,
                "version": __version__,
                "source": self.source,
                "repository": fields_form(self.repository) if self.repository else None,
                "options": self.options,
                "fingerprint": self.fingerprint,
                "digest": self.digest,
            }
        ) | {"probe": _probe_to_dict(self.probe)}

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `trtllm_ct.json`: the record, and mode and reason of every quantized module."""
        return self.record() | {"modes": json_form(self.modes), "contents": dict(self.contents)}

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The opened source, with the stored `probe` instead of one that is read again.

        Raises `SidecarError` when the source is missing or changed, and what `open_checkpoint` raises.
        """
        if not self.source.is_dir():
            raise SidecarError(
                Fault(
                    where=str(self.source),
                    expected=f"the checkpoint that {self.directory} was made for",
                    found="no such directory on this node",
                    remedy="Put it at the same path on every node, or give the id of a Hugging Face repository.",
                )
            )
        checkpoint = open_checkpoint(self.source, probe=self.probe)
        if fingerprint_of(checkpoint) != self.fingerprint:
            raise SidecarError(self._changed("another config.json, or other headers of its weights"))
        return checkpoint

    @cached_property
    def plan(self) -> Plan:
        """The plan for the options of this sidecar; raises `SidecarError` when it differs from the recorded plan."""
        plan = self.checkpoint.plan_for(self.options)
        if digest_of(plan) != self.digest:
            changed = [name for name, entry in modes_of(plan).items() if entry[0] != self.modes.get(name, entry)[0]]
            raise SidecarError(self._changed(f"another plan ({format_names(changed) or 'of the model as a whole'})"))
        return plan

    def plan_for(self, parallel: Parallel) -> Plan:
        """Return the plan for the parallel sizes that the engine actually runs with.

        Raises `SidecarError` when these sizes need other modes than the sidecar configures the engine for.
        """
        if parallel == self.options.parallel:
            return self.plan
        if parallel not in self._other_plans:
            self._other_plans[parallel] = self._make_plan(parallel)
        return self._other_plans[parallel]

    @cached_property
    def _other_plans(self) -> dict[Parallel, Plan]:
        """The plans for other sizes than those of the options, as far as they were made."""
        return {}

    def _make_plan(self, parallel: Parallel) -> Plan:
        plan = self.checkpoint.plan_for(replace(self.options, parallel=parallel))
        if digest_of(plan) != self.digest:
            before, after = modes_of(self.plan), modes_of(plan)
            changed = [name for name in after if after[name][0] != before.get(name, ("", ""))[0]]
            raise SidecarError(
                Fault(
                    where=str(self.directory),
                    expected=f"the sizes that it was made for ({_sizes(self.options.parallel)})",
                    found=f"{_sizes(parallel)}, where other modes are needed for {format_names(changed)}",
                    remedy=f"Call trtllm_ct.prepare with the sizes that LLM is given: {_arguments(parallel)}.",
                )
            )
        return plan

    def _changed(self, found: str) -> Fault:
        return Fault(
            where=str(self.source),
            expected=f"the checkpoint as it was when {self.directory} was made from it",
            found=found,
            remedy="Call trtllm_ct.prepare again, in the process that starts the engine; all nodes need one release.",
        )


def is_sidecar(directory: str | Path) -> bool:
    """Whether a directory is a sidecar, intact or damaged: it contains `trtllm_ct.json`."""
    return (Path(directory) / SIDECAR_FILE).is_file()


def make_sidecar_and_plan(
    source: str | Path,
    options: PlanOptions,
    *,
    root: Path | None = None,
    repository: Repository | None = None,
    detection: Detection | None = None,
) -> tuple[Path, Plan]:
    """Return the directory of a compressed-tensors checkpoint's sidecar, and its plan; make it if it doesn't exist.

    Reads headers only. The sidecar is in `root`, which defaults to `cache_root()`. Its name is a hash of everything
    that it depends on: source, decisions, options and the release of this package. It appears atomically, also when
    several processes make it at once, and is not cleared while this process runs. With `repository`, nodes that lack
    the source can download it. `detection` is the detection of `source`, if it was made before.
    Raises `CheckpointError` for a source that can't be read or planned, or that the engine's class would misread, and
    `SidecarError` when the sidecar can't be written.
    """
    source = Path(source).resolve()
    checkpoint = open_checkpoint(source, detection)
    plan = checkpoint.plan_for(options)
    refuse_misread(plan.problems)
    sidecar = Sidecar(
        directory=Path(),
        source=source,
        options=options,
        fingerprint=fingerprint_of(checkpoint),
        digest=digest_of(plan),
        probe=checkpoint.probe,
        modes=modes_of(plan),
        repository=repository,
    )
    names = side_files(source).carried
    sidecar = replace(sidecar, directory=(root or cache_root()).absolute() / _key(sidecar, names))
    _write(sidecar, checkpoint, plan, names)
    return sidecar.directory, plan


def make_sidecar(
    source: str | Path,
    options: PlanOptions,
    *,
    root: Path | None = None,
    repository: Repository | None = None,
    detection: Detection | None = None,
) -> Path:
    """Return the directory of a sidecar without its plan; see `make_sidecar_and_plan`."""
    return make_sidecar_and_plan(source, options, root=root, repository=repository, detection=detection)[0]


def restore_sidecar(directory: Path, record: Mapping[str, Any]) -> Sidecar:
    """Make a sidecar again on a node that lacks it, at the path that the engine was given.

    `record` is the output of `Sidecar.record` in the process that made the sidecar. Raises what `make_sidecar` raises,
    and `SidecarError` when the source or the plan differs on this node.
    """
    sidecar = Sidecar.from_dict(directory, record)
    if not sidecar.source.is_dir() and sidecar.repository is not None:
        sidecar = replace(sidecar, source=sidecar.repository.checkpoint().resolve())
    plan = sidecar.plan
    _write(replace(sidecar, modes=modes_of(plan)), sidecar.checkpoint, plan, side_files(sidecar.source).carried)
    return Sidecar.open(directory)


def known_sidecars() -> dict[str, dict[str, Any]]:
    """Return the records of the sidecars that this process made or reused, by directory.

    Loaders are pickled with these records, from which other nodes make the sidecars again.
    """
    return dict(_known)


def modes_of(plan: Plan) -> dict[str, tuple[str, str]]:
    """Return the mode of every quantized module and the reason for it, by module name."""
    return {module.name: (module.delivered_mode, module.reason) for module in plan.modules if module.weight is not None}


def digest_of(plan: Plan) -> str:
    """Return a hash of the plan's decisions: dtypes, the engine's quantization configuration, and all modes.

    The reasons are not part of it, so their wording may change.
    """
    decisions = {
        "dtype": plan.dtype.torch_name,
        "dequantized": plan.dense_dtype.torch_name,
        "quantization": plan.quant_config.to_dict(),
        "modes": {module: mode for module, (mode, _) in modes_of(plan).items()},
    }
    return _hash(decisions)


def fingerprint_of(checkpoint: Checkpoint) -> str:
    """Return a hash of a checkpoint's config.json and all headers of its weight files. Payloads are not read.

    The tensors that the index does not list are a part of it, because the plan may leave them out.
    """
    headers = [
        (tensor.file, name, tensor.spec.dtype.header_name, tensor.spec.shape, tensor.offset)
        for name, tensor in checkpoint.catalog.tensors.items()
    ]
    return _hash([checkpoint.hf_config, headers, sorted(checkpoint.catalog.unlisted)])


def _probe_to_dict(probe: Probe) -> dict[str, Any]:
    """Return the fields by name, in JSON types; scalars that are not finite stay numbers, as they are read back."""
    return fields_form(probe) | {"scalars": dict(probe.scalars)}


def _probe_from_dict(entry: Mapping[str, Any]) -> Probe:
    return from_fields(Probe, entry, powers=_tuples, zero=frozenset, trivial=frozenset, shapes=_tuples)


def _tuples(entry: Mapping[str, list[Any]]) -> dict[str, tuple[Any, ...]]:
    return {name: tuple(values) for name, values in entry.items()}


def _key(sidecar: Sidecar, names: tuple[str, ...]) -> str:
    """Return the name of a sidecar, a hash of its record and of the names of the files that it links to.

    A new file in the source therefore leads to a new sidecar, which links to it. Side files that are written otherwise
    than the source has them are hashed with their content.
    """
    rewritten = {name: content.decode() for name, content in rewritten_side_files(sidecar.source).items()}
    return _hash([sidecar.record(), names, "with contents", *([rewritten] if rewritten else [])])[:32]


def _hash(value: object) -> str:
    return sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _write(sidecar: Sidecar, checkpoint: Checkpoint, plan: Plan, names: tuple[str, ...]) -> None:
    """Write a sidecar unless it exists, take a lease on it, and remember its record. `names` are the files to link."""
    with new_sidecar_directory(sidecar.directory) as folder:
        if folder is not None:
            for name in names:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).symlink_to(sidecar.source / name)
            write_configuration(checkpoint, plan, folder)
            sidecar = replace(sidecar, contents=contents_of(folder, without=SIDECAR_FILE))
            (folder / SIDECAR_FILE).write_text(json.dumps(sidecar.to_dict(), indent=1) + "\n", encoding="utf-8")
            make_private(folder)
    if Sidecar.open(sidecar.directory).record() != json.loads(json.dumps(sidecar.record())):
        raise SidecarError(_damaged(sidecar.directory / SIDECAR_FILE, "the record of another source or plan"))
    _known[str(sidecar.directory)] = sidecar.record()


def _sizes(parallel: Parallel) -> str:
    """Return the sizes in words, for an error message."""
    sizes = [f"tensor {parallel.tensor}", f"pipeline {parallel.pipeline}", f"expert {parallel.expert}"]
    return ", ".join([*sizes, *(["attention data parallel"] if parallel.attention_dp else [])])


def _arguments(parallel: Parallel) -> str:
    """Return the sizes as keyword arguments of `prepare`, which are those of `LLM`, for an error message."""
    arguments = {
        "tensor_parallel_size": parallel.tensor,
        "pipeline_parallel_size": parallel.pipeline,
        "moe_expert_parallel_size": parallel.expert,
        "enable_attention_dp": parallel.attention_dp,
    }
    return ", ".join(f"{name}={value}" for name, value in arguments.items())


def _damaged(path: Path, found: str) -> Fault:
    return Fault(
        where=str(path),
        expected="what this release of trtllm-ct writes there",
        found=found,
        remedy="Delete the directory and call trtllm_ct.prepare again.",
    )
