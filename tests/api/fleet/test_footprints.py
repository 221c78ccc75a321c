"""Footprints over HTTP, and in the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import Result
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from app.api.fleet.footprints import KEYS, FootprintQuery, devices_of
from app.api.services import Services
from app.cli import app
from app.devices.device import HardwareKind, Inventory, MeasuredDevice
from app.footprint import estimate
from app.kernel.errors import ArrieroError, InvalidInput, ModelUnsupported, NotFound

URL = "/v1/catalog/smollm2:135m/footprint"


def run(folder: Path, *arguments: str) -> Result:
    result = CliRunner().invoke(
        app, ["--data-dir", str(folder), "models", "footprint", *arguments], env={"COLUMNS": "200"}
    )
    if isinstance(result.exception, ArrieroError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def test_a_footprint_by_source_and_device(client: TestClient, services: Services, monkeypatch: Any) -> None:
    first = client.get(URL).json()
    assert [(one["source"], one["chosen"]) for one in first["footprints"]] == [
        ("dry run", True),
        ("closed form", False),
    ]
    assert first["missing"] == {"measured": "this configuration has not run yet"}
    share = first["footprints"][0]["shares"][0]
    assert share["device"] == "cpu"
    assert share["weights"] == 96_576_768
    assert share["cache"] == 8192 * 30 * 2 * 3 * 64 * 2
    assert share["reserved"] == share["total"] + share["margin"]

    monkeypatch.setattr(estimate, "_PROBE", "no_such_module")
    assert client.get(URL).json() == first, "a dry run is made once, and remembered"


def test_options_replace_values_of_the_entry(client: TestClient) -> None:
    given = {"slots": 2, "context": 512, "kv_type_k": "q8_0", "kv_type_v": "q8_0", "layout": "streams", "ubatch": 128}
    answer = client.get(URL, params=given).json()
    assert answer["configuration"]["context"] == 1024
    assert answer["configuration"]["streams"] is True
    assert answer["footprints"][0]["shares"][0]["cache"] == 1024 * 30 * 2 * 3 * 64 * 34 // 32


@pytest.mark.parametrize(
    ("given", "where", "accepted"),
    [
        ({"slots": "200"}, "slots", "1 to 128"),
        ({"slots": "many"}, "query.slots", ""),
        ({"kv_type_k": "q9"}, "kv_type_k", "q8_0"),
        ({"kv_type_v": "q8_0", "flash_attention": "off"}, "kv_type_v", "f16"),
        ({"batch": "1"}, "batch", "32 to 65536"),
        ({"layers": "1"}, "query.layers", "slots"),
    ],
)
def test_invalid_values_are_named(client: TestClient, given: dict[str, str], where: str, accepted: str) -> None:
    answer = client.get(URL, params=given)
    assert answer.status_code == 422
    problem = answer.json()["errors"][0]
    assert problem["where"] == where
    assert accepted in problem["accepted"]


def test_unknown_models_and_devices(client: TestClient) -> None:
    assert client.get("/v1/catalog/nothing:1b/footprint").status_code == 404
    assert "cpu" in client.get(URL, params={"devices": "gpu-77"}).json()["detail"]
    missing = client.get("/v1/catalog/qwen3:4b/footprint")
    assert missing.status_code == 409
    assert "arriero models pull qwen3:4b" in missing.json()["detail"]


def test_the_command_prints_a_table_and_json(tmp_path: Path) -> None:
    table = run(tmp_path, "smollm2:135m", "--no-dry-run", "--context", "512").stdout
    assert "closed form" in table
    assert "92.1 MiB" in table
    assert "measured: no database was used" in table
    document = json.loads(run(tmp_path, "smollm2:135m", "--no-dry-run", "--park", "64MiB", "--json").stdout)
    assert document["footprints"][0]["shares"][0]["parked"] == 64 * 2**20


def test_the_command_supports_simulated_devices(tmp_path: Path) -> None:
    pair = '[{"name": "sim-0", "bytes": "24GiB"}, {"name": "sim-1", "bytes": "24GiB"}]'
    given = [
        "--set",
        f"fleet.simulated={pair}",
        "models",
        "footprint",
        "smollm2:135m",
        "--device",
        "sim-0,sim-1",
        "--json",
    ]
    result = CliRunner().invoke(app, ["--data-dir", str(tmp_path), *given])
    answer = json.loads(result.stdout)
    assert "simulated" in answer["missing"]["dry run"]
    shares = answer["footprints"][0]["shares"]
    assert [share["device"] for share in shares] == ["cpu", "sim-0", "sim-1"]
    assert all(share["weights"] for share in shares)
    assert [share["simulated"] for share in shares] == [False, True, True]


PAIR = [MeasuredDevice(f"gpu-{n}", HardwareKind.GPU, "NVIDIA L4", 1, 1, uuid=f"GPU-{n}") for n in (0, 1)]
PART = replace(PAIR[0], name="gpu-0-1", parent="GPU-0")
SIMULATED = replace(PAIR[0], name="sim-0", kind=HardwareKind.SIMULATED)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("cpu,gpu-0", "cpu cannot be combined with GPUs"),
        ("gpu-0,gpu-0", "named twice"),
        ("gpu-0,sim-0", "real and simulated devices are mixed"),
        ("gpu-0,gpu-0-1", "only one MIG instance"),
    ],
)
def test_devices_that_one_process_cannot_use_together(names: str, message: str) -> None:
    cpu = replace(PAIR[0], name="cpu", kind=HardwareKind.CPU)
    inventory = Inventory((cpu, *PAIR, PART, SIMULATED))
    with pytest.raises(InvalidInput, match=message):
        devices_of(names, inventory)
    assert devices_of("gpu-1, gpu-0", inventory) == (PAIR[1], PAIR[0])
    assert devices_of("gpu-0-1", inventory) == (PART,)


def test_the_command_checks_the_kind_of_adapters_and_projectors(tmp_path: Path) -> None:
    files = {}
    for name, architecture, kind in (("lora", "llama", "adapter"), ("other", "qwen3", "adapter"), ("eye", "clip", "")):
        writer = gguf.GGUFWriter(files.setdefault(name, tmp_path / f"{name}.gguf"), architecture)
        writer.add_type(kind or "mmproj")
        writer.add_tensor("blk.0.attn_q.weight.lora_a", np.zeros((2**18, 4), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def weights(*options: Any) -> int:
        given = ("smollm2:135m", "--no-dry-run", "--json", *map(str, options))
        return int(json.loads(run(tmp_path, *given).stdout)["footprints"][0]["shares"][0]["weights"])

    plain = weights()
    assert weights("--lora", files["lora"], "--lora", files["lora"]) == plain + 2 * 2**22
    assert weights("--mmproj", files["eye"]) == plain + 2**22
    for options, message in (
        (["--lora", files["eye"]], "'adapter' is required"),
        (["--mmproj", files["lora"]], "'mmproj'"),
    ):
        bad = CliRunner().invoke(app, ["models", "footprint", "smollm2:135m", *map(str, options)])
        assert bad.exit_code == 2
        assert message in bad.output
    with pytest.raises(ModelUnsupported, match="an adapter of qwen3, not of llama"):
        run(tmp_path, "smollm2:135m", "--lora", str(files["other"]))


def test_the_command_rejects_what_the_api_rejects(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="slots: 200 is not accepted; accepted: a whole number from 1 to 128"):
        run(tmp_path, "smollm2:135m", "--slots", "200")
    with pytest.raises(NotFound, match="gpu-9"):
        run(tmp_path, "smollm2:135m", "--device", "gpu-9")
    bad = CliRunner().invoke(app, ["models", "footprint", "smollm2:135m", "--park", "much"])
    assert bad.exit_code == 2
    assert "is not a size" in bad.output


def test_the_api_and_the_command_have_the_same_options() -> None:
    assert set(FootprintQuery.model_fields) == {*KEYS, "devices"}
