"""
The opening of an engine's store: its identity, its key and its folder, from the options.

The identity is a hash of all that a state depends on beside its tokens: the file of the model, the adapters with their
scales, the build of llama.cpp, the projector, and the options that change the content or the form of the cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import structlog

from app.catalog import header
from app.catalog.files import file_version
from app.devices import llama_build
from app.kernel import ids
from workers.engine.bindings.llama import LlamaModel, flash_attention
from workers.engine.kv_store.sealing import SealingKey
from workers.engine.kv_store.state_file import Acceptance
from workers.engine.kv_store.state_folder import StateFolder
from workers.engine.kv_store.store import PrefixStore, StoreLimits
from workers.engine.options import EngineOptions

_LOG = structlog.get_logger(__name__)

#: Seconds that saving may add to a step while texts are written, where no `step_latency` says so.
_SAVE_SECONDS = 0.2


def open_store(model: LlamaModel, options: EngineOptions) -> PrefixStore | None:
    """
    Open the store of an engine; None when its options have none.

    A folder that cannot be used is logged, and states are kept in memory only. Raises Unavailable when states are to be
    encrypted and the package for it is missing.
    """
    if not options.shares or not options.store_bytes:
        return None
    limits = StoreLimits(
        memory=options.store_bytes,
        with_parked=options.state_bytes,
        save_seconds=options.step_latency or _SAVE_SECONDS,
        # llama.cpp saves no cell that is behind the window, whatever `swa_full` says.
        longest_cut=0 if model.recurrent else model.window or None,
    )
    return PrefixStore(limits, _folder(model.path, options))


def identity(path: Path, options: EngineOptions, scales: Mapping[str, float] | None = None) -> bytes:
    """Return the identity of states; `scales` are those of the adapters, where they are not those of the options."""
    adapters = [
        (_of_file(lora.path), scale)
        for lora in options.loras
        if (scale := lora.scale if scales is None else scales.get(lora.name, 0.0))
    ]
    about = {
        "model": _of_file(path),
        "adapters": adapters,
        "build": llama_build.build(),
        "kv": [options.kv_type_k, options.kv_type_v],
        "flash_attention": flash_attention(options),
        "context": options.context,
        "streams": options.slots if options.streams else 0,
        "swa_full": options.swa_full,
        "rope": options.rope.model_dump(),
        "projector": None if options.projector is None else _of_file(options.projector),
        "image_tokens": options.image_tokens,
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).digest()


def _of_file(path: Path) -> tuple[str, list[tuple[int, int]]]:
    """Return the digest of the header, and size and time of modification of each part."""
    return header.read(path).digest, [(size, mtime) for _, _, size, mtime, _ in file_version(path)]


def _folder(path: Path, options: EngineOptions) -> StateFolder | None:
    if not options.store_disk_bytes or options.store_folder is None:
        return None
    key = None
    if options.store_encrypted:
        given = options.store_key
        secret = ids.new_salt() + ids.new_salt() if given is None else given.get_secret_value().encode()
        key = SealingKey(secret, ephemeral=given is None)
    acceptance = Acceptance(identity(path, options), options.context, options.state_bytes, key)
    try:
        return StateFolder(options.store_folder, options.store_disk_bytes, acceptance)
    except OSError as error:
        _LOG.warning("kv_folder_unusable", folder=str(options.store_folder), reason=str(error))
        return None
