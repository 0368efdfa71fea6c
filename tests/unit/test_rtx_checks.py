"""The checks of a TensorRT-RTX plan on made-up logs, listings and files; no compiler is needed."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.engine.rtx_expected import Form
from pipeline.engine.rtx_layers import CompiledLayer, parse_listing
from pipeline.engine.rtx_log import CompilerLog, is_unexpected
from pipeline.engine.rtx_plan import Chunk, check_header, read_header
from pipeline.engine.rtx_weights import prove_weights
from pipeline.errors import GateError

# --- log -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("severity", "message", "unexpected"),
    [
        ("INFO", "Total Activation Memory: 5 bytes", False),
        ("VERBOSE", "Disabling unused tactic source: JIT_CONVOLUTIONS", False),
        ("WARNING", "ModelImporter.cpp:1071: Make sure input input_ids has Int64 binding.", False),
        ("ERROR", "Make sure input input_ids has Int64 binding.", True),
        ("WARNING", "Make sure input x has Int64 binding. And something else", True),
        ("WARNING", "[RemoveDeadLayers] Input Tensor kv_lengths is unused", True),
        ("VERBOSE", "Unused Input: kv_lengths", True),
        ("INTERNAL_ERROR", "anything", True),
    ],
)
def test_only_known_warnings_pass(severity: str, message: str, unexpected: bool) -> None:
    assert is_unexpected(severity, message) is unexpected


def test_the_log_keeps_everything_and_picks_what_is_needed() -> None:
    file = io.StringIO()
    log = CompilerLog(file)
    log.add("INFO", "Total Activation Memory: 1234 bytes")
    log.add("VERBOSE", "Layers:\nName: a")
    log.add("WARNING", "something new")
    assert (log.activation_bytes, log.listing) == (1234, "Layers:\nName: a")
    assert log.unexpected == ["WARNING: something new"]
    assert file.getvalue().count("\n") == 4


# --- listing -------------------------------------------------------------------------------------

TENSOR = (
    "{{ Name: {}, Dimensions: [-1,2], Strides: [2,1], StrideOrder: [1,0], Datatype: {}, "
    "Format: (Linear) Row major linear format }}"
)


def test_a_listing_is_read_to_its_end() -> None:
    product = (
        "Name: __myl_Fc_1, LayerType: runtime_fusion, Inputs: [ "
        + TENSOR.format("x", "Half")
        + "], Constants: [ "
        + TENSOR.format("c", "Int4")
        + ", "
        + TENSOR.format("d", "Half")
        + "], Outputs: [ "
        + TENSOR.format("y", "Half")
        + "], TacticName: t, StreamId: 0, Metadata: [ONNX Layer: a.b]\x1f[ONNX Layer: c]"
    )
    signal = (
        "Name: s, LayerType: signal, Inputs: [], Constants: [], Outputs: [], TacticName: , "
        "StreamId: 1, EventId: 12, Metadata: "
    )
    listing = f"Layers:\n{product}\n{signal}\n\nI/O Tensors:\n Name: x, IOMode: Input\nName: z"
    assert parse_listing(listing, "log") == [
        CompiledLayer(
            "__myl_Fc_1",
            "runtime_fusion",
            ("x",),
            ("y",),
            ("Int4", "Half"),
            ("a.b", "c"),
            ("Half",),
        ),
        CompiledLayer("s", "signal", (), (), (), ()),
    ]


@pytest.mark.parametrize(
    ("listing", "message"),
    [
        ("", "log: no layer listing"),
        ("Layers:\nName: x, Kind: gemm", "log: the layer listing has a form that is not known"),
    ],
)
def test_an_unknown_listing_is_refused(listing: str, message: str) -> None:
    with pytest.raises(GateError) as caught:
        parse_listing(listing, "log")
    assert str(caught.value).startswith(message)


# --- header --------------------------------------------------------------------------------------


def plan_bytes(
    sm_mask: int = 8, version: tuple[int, ...] = (1, 7, 1, 116), weights: bytes = b"w" * 32
) -> bytes:
    """A plan with an 8-byte engine chunk, laid out by hand as facts/tensorrt_rtx.md describes."""
    data = bytearray(112)
    data[0:4] = data[28:32] = b"vtrt"
    data[16:24] = struct.pack("<Q", 112 + 8 + len(weights))
    data[24:28] = bytes(version)
    data[32:36] = struct.pack("<I", sm_mask)
    data[56:64] = struct.pack("<Q", len(weights))
    data[64:88] = b"NGNE\0\0\0\0" + struct.pack("<QQ", 112, 8)
    data[88:112] = b"THGW\0\0\0\0" + struct.pack("<QQ", 120, len(weights))
    return bytes(data) + b"e" * 8 + weights


def test_a_header_is_read(tmp_path: Path) -> None:
    path = tmp_path / "plan"
    path.write_bytes(plan_bytes(sm_mask=4 + 8))
    header = read_header(path)
    assert (header.file_bytes, header.version, header.sms) == (152, "1.7.1.116", (86, 89))
    assert (header.engine, header.weights) == (Chunk(112, 8), Chunk(120, 32))


@pytest.mark.parametrize("kept", [0, 3, 63, 111, 151])
def test_a_truncated_plan_is_refused(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "plan"
    path.write_bytes(plan_bytes()[:kept])
    with pytest.raises(GateError, match=r"not a TensorRT-RTX plan|truncated or damaged"):
        read_header(path)


@pytest.mark.parametrize("position", [28, 64, 88])
def test_an_unknown_header_is_refused(tmp_path: Path, position: int) -> None:
    data = bytearray(plan_bytes())
    data[position] ^= 1
    path = tmp_path / "plan"
    path.write_bytes(data)
    with pytest.raises(GateError, match="header of an unknown form"):
        read_header(path)


def test_another_version_or_target_is_named(tmp_path: Path) -> None:
    path = tmp_path / "plan"
    path.write_bytes(plan_bytes(sm_mask=2 + 8, version=(1, 6, 0, 1)))
    with pytest.raises(GateError) as caught:
        check_header(path, "1.7.1.116", (89,))
    assert [str(problem).partition("plan: ")[2] for problem in caught.value.problems] == [
        "was built by TensorRT-RTX 1.6.0.1; allowed: 1.7.1.116; fix: build again",
        "was built for SM80, SM89; allowed: SM89; fix: build again",
    ]


# --- weights -------------------------------------------------------------------------------------


def form(*names: str, pieces: list[bytes]) -> Form:
    def blocks() -> Iterator[np.ndarray[Any, Any]]:
        return (np.frombuffer(piece, np.uint8) for piece in pieces)

    return Form(names, blocks)


def proof_of(path: Path, chunk: bytes, forms: list[Form]) -> tuple[int, int]:
    path.write_bytes(b"head" + chunk + b"tail")
    proof = prove_weights(path, Chunk(4, len(chunk)), forms)
    return proof.num_tensors, proof.num_bytes


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_tensors_are_found_wherever_they_lie(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """At any offset, in any order, with low-entropy content that repeats."""
    contents = data.draw(
        st.lists(
            st.tuples(st.sampled_from([b"\0", b"\1", b"ab", b"abcdefgh"]), st.integers(1, 60)).map(
                lambda pair: pair[0] * pair[1]
            )
            | st.binary(min_size=1, max_size=200),
            min_size=1,
            max_size=6,
        )
    )
    gaps = data.draw(st.lists(st.integers(0, 20), min_size=len(contents), max_size=len(contents)))
    order = data.draw(st.permutations(range(len(contents))))
    chunk = b"".join(b"\x7f" * gaps[index] + contents[index] for index in order)
    forms = [
        form(
            str(index),
            pieces=[content[: len(content) // 2 or 1], content[len(content) // 2 or 1 :]],
        )
        for index, content in enumerate(contents)
    ]
    path = tmp_path_factory.mktemp("plan") / "plan"
    assert proof_of(path, chunk, forms)[0] == len(contents)


@settings(max_examples=60, deadline=None)
@given(content=st.binary(min_size=1, max_size=300), data=st.data())
def test_one_changed_bit_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, data: st.DataObject
) -> None:
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    chunk = b"\xee" * 16 + bytes(changed)
    assume(content not in chunk)  # elsewhere by chance
    path = tmp_path_factory.mktemp("plan") / "plan"
    with pytest.raises(GateError, match="w: is not in the engine's weights byte for byte"):
        proof_of(path, chunk, [form("w", pieces=[content])])


def test_a_tensor_beyond_the_chunk_does_not_count(tmp_path: Path) -> None:
    with pytest.raises(GateError, match="byte for byte"):
        proof_of(tmp_path / "plan", b"0123456789abcdef", [form("w", pieces=[b"9abcdef", b"tail"])])


def test_one_form_is_enough_and_all_missing_are_listed(tmp_path: Path) -> None:
    chunk = bytes(range(64))
    forms = [
        form("plain", pieces=[chunk[16:32]]),
        form("plain", pieces=[b"x" * 16]),
        form("fc", pieces=[b"y" * 16]),
        form("gate", pieces=[b"z" * 16]),
        form("gate", "fc", pieces=[chunk[32:64]]),
    ]
    assert proof_of(tmp_path / "plan", chunk, forms) == (3, 48)
    with pytest.raises(GateError) as caught:
        proof_of(tmp_path / "other", chunk[:40], forms)
    assert [problem.where.rpartition(": ")[2] for problem in caught.value.problems] == [
        "fc",
        "gate",
    ]
