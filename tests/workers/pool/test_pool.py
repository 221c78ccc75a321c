"""A pool: the options of its engine, and the adjustment of its reservation."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app.catalog.catalog import Catalog
from app.catalog.engine_options import Rope
from app.catalog.model import Model
from app.fleet.holder import DevicePart, Grant, ReservationHolder
from app.fleet.hosts import Hosts
from app.fleet.ledger import session
from app.fleet.ledger.reservation import Reservation
from app.footprint.footprint import HOST, Footprint, FootprintSource, Share
from app.kernel import settings
from app.kernel.database import Database
from app.kernel.errors import InvalidSettings, ModelFileMissing
from app.kernel.settings import Settings
from tests.fleet.granting import LEASE, begun, device_reports, granted
from workers.engine.bindings.llama import thread_counts
from workers.engine.options import DraftFile, EngineOptions, Lora
from workers.pool import pool
from workers.pool.progress import Status
from workers.runtime import Resources


def model(**values: Any) -> Model:
    entry = {"name": "m:1", "use_cases": ["chat"], "source": {"path": "/m.gguf"}, "context": 512, "slots": 2}
    return Model.model_validate(entry | values)


def loaded(tmp_path: Path, **environment: str) -> Settings:
    return settings.load(environment={"ARRIERO_DATA_DIR": str(tmp_path), **environment}).settings


def test_every_option_of_an_entry_reaches_the_engine(tmp_path: Path) -> None:
    style = tmp_path / "style.gguf"
    style.write_bytes(b"GGUF")
    eyes = tmp_path / "mmproj.gguf"
    eyes.write_bytes(b"GGUF")
    less = tmp_path / "less.gguf"
    less.write_bytes(b"GGUF")
    given = {
        "layout": "streams", "reuse": False, "batch": 64, "ubatch": 32, "step_latency": 0.5, "threads": 3,
        "threads_batch": 4, "swa_full": False, "mmap": False, "mlock": True, "gpu_layers": 7, "split_mode": "row",
        "tensor_split": [1, 2], "main_gpu": 1, "rope": {"scaling": "yarn", "freq_scale": 0.5}, "park_bytes": 1,
        "park_progress": 2, "patience": 3, "queue": 4, "embedding_context": 64, "pooling": "last",
        "store_bytes": 5, "store_encrypted": True,
    }  # fmt: skip
    lora = {"name": "style", "scale": 0.5, "source": {"path": str(style)}}
    found = pool.options_of(
        model(
            engine=given | {"loras": [lora], "draft": {"source": {"path": str(less)}, "most": 3}},
            kv={"k": "q8_0", "v": "q4_0"}, flash_attention="on",
            prompt={"stop": ["x"], "tools": "hermes"},
            mmproj={"source": {"path": str(eyes)}, "image_tokens": 256},
        ),
        loaded(tmp_path), gpus=True, threads=6,
    )  # fmt: skip
    expected = EngineOptions(
        slots=2, context=1024, kv_type_k="q8_0", kv_type_v="q4_0", flash_attention=True, vectors=False,
        loras=(Lora(name="style", scale=0.5, path=style),), profile={"stop": ("x",), "tools": "hermes"},
        projector=eyes, image_tokens=256, draft=DraftFile(path=less, most=3),
        store_folder=tmp_path / "kv" / model().slug, most_threads=6, **given,
    )  # fmt: skip
    assert found == expected
    assert found.rope == Rope(scaling="yarn", freq_scale=0.5)
    untouched = set(EngineOptions.model_fields) - found.model_fields_set
    assert {name for name in EngineOptions.model_fields if getattr(found, name) == getattr(EngineOptions(), name)} == {
        "kept",
        "reproducible",
        "speculation",  # `off` conflicts with `draft`
        "store_disk_bytes",  # conflicts with `reuse`
        "store_key",  # a setting
    }, "every other option is set above"
    assert untouched == set()
    off = pool.options_of(model(engine={"speculation": "off"}), loaded(tmp_path), gpus=False, threads=1)
    assert off.speculation == "off"


def test_the_limit_and_the_key_of_state_files_reach_the_engine(tmp_path: Path) -> None:
    host = loaded(tmp_path, ARRIERO_POOLS__STORE_KEY="a key of some length")
    found = pool.options_of(model(engine={"store_disk_bytes": 7}), host, gpus=False, threads=1)
    assert found.store_key is not None
    assert (found.store_disk_bytes, found.store_key.get_secret_value()) == (7, "a key of some length")
    with pytest.raises(InvalidSettings, match="16 characters"):
        loaded(tmp_path, ARRIERO_POOLS__STORE_KEY="short")


def test_the_threads_of_the_entry_replace_the_share_of_the_host(tmp_path: Path) -> None:
    host = loaded(tmp_path)
    measured, fixed = (
        pool.options_of(model(engine=entry), host, gpus=False, threads=5) for entry in ({}, {"threads": 2})
    )
    assert (measured.threads, measured.most_threads) == (None, 5)
    assert fixed.threads == 2
    assert thread_counts(measured) == (5, 5)
    assert thread_counts(fixed) == (2, 2)


def test_without_gpus_no_layer_is_offloaded(tmp_path: Path) -> None:
    tuned = model(engine={"gpu_layers": 9})
    layers = [pool.options_of(tuned, loaded(tmp_path), gpus=gpus, threads=1).gpu_layers for gpus in (False, True)]
    assert layers == [0, 9]


def test_a_missing_adapter_is_named(tmp_path: Path) -> None:
    lora = {"name": "style", "source": {"path": str(tmp_path / "style.gguf")}}
    with pytest.raises(ModelFileMissing, match=r"style\.gguf"):
        pool.options_of(model(engine={"loras": [lora]}), loaded(tmp_path), gpus=False, threads=1)


def test_a_pool_reserves_its_growth(database: Database, tmp_path: Path) -> None:
    hosts = Hosts(database, LEASE, LEASE)
    agent = hosts.join("h", "here", 8, device_reports("a"), {})
    id_ = granted(database, "h", {"a": 600})
    assert isinstance(id_, str)
    epoch = begun(hosts, "h", agent, id_)

    def held() -> Reservation:
        with database.work() as work:
            return session.open_session(work, "h", to_read=True).ledger.reservations[id_]

    part = DevicePart("a", "a", "L4", "GPU-0", simulated=False, speed=1.0, bandwidth=None, bytes=600)
    grant = Grant(id_, epoch, held().revision, "h", "m-1.x", "m:1", 4, 1, (part,))
    resources, holder = Resources(database, Catalog()), ReservationHolder(database, LEASE)
    serving: Any = pool._Pool(loaded(tmp_path), resources, holder, grant, None, Status("m:1"))  # type: ignore[arg-type] # without a heartbeat
    grown = [None, 700, 5000, None, 800]
    shares = [None if size is None else (Share(HOST), Share(0, weights=size)) for size in grown]
    footprints = iter([None if one is None else Footprint(FootprintSource.MEASURED, one, {0: 50}) for one in shares])
    serving._measuring = SimpleNamespace(grown=lambda: next(footprints))
    seen = []
    for _ in grown:
        serving._adjust_to_growth()
        seen.append(held().bytes["a"])
    assert seen == [600, 750, 750, 750, 850], "more than the device has is refused, and the pool continues"
