"""The gRPC half of the client: one ModelStreamInfer call per prompt."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from pipeline.errors import PipelineError, Problem, RequestError, StageError, ToolError
from pipeline.serving.answer import Piece, broke_off, is_server_fault, not_reachable, piece_from
from pipeline.serving.model_config import DataType
from pipeline.serving.repository import INPUTS

# A proxy of the environment would get in the way of a server on this machine or network.
_CHANNEL_OPTIONS = (("grpc.enable_http_proxy", 0),)

# data type of an input: (name on the wire, field of InferTensorContents)
_WIRE = {
    DataType.BOOL: ("BOOL", "bool_contents"),
    DataType.INT32: ("INT32", "int_contents"),
    DataType.UINT64: ("UINT64", "uint64_contents"),
    DataType.FP32: ("FP32", "fp32_contents"),
    DataType.STRING: ("BYTES", "bytes_contents"),
}
_DATA_TYPES = {tensor.name: tensor.data_type for tensor in INPUTS}


def ask_grpc(
    url: str, model: str, prompt: str | bytes, fields: dict[str, Any], *, timeout_s: float
) -> Generator[Piece, None, None]:
    """See `pipeline.serving.client.ask`. `fields` are the inputs besides the prompt."""
    grpc, service_pb2, service_pb2_grpc = _import_grpc()
    address = url.rpartition("://")[2].rstrip("/")
    request = service_pb2.ModelInferRequest(model_name=model)
    _add_input(request, "text_input", prompt)
    for name, value in fields.items():
        _add_input(request, name, value)
    with grpc.insecure_channel(address, options=_CHANNEL_OPTIONS) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        call = stub.ModelStreamInfer(iter([request]), timeout=timeout_s)
        began = False
        try:
            for response in call:
                began = True
                if response.error_message:
                    raise _refusal(address, response.error_message)
                yield piece_from(_outputs(response.infer_response))
        except grpc.RpcError as error:
            if began and error.code() is grpc.StatusCode.UNAVAILABLE:
                raise broke_off(address, error.details()) from error
            raise _rpc_error(grpc, address, error, timeout_s) from error
        finally:
            call.cancel()


def _import_grpc() -> tuple[Any, Any, Any]:
    try:
        import grpc
        from tritonclient.grpc import service_pb2, service_pb2_grpc
    except ImportError as error:
        raise ToolError(
            Problem(
                "tritonclient", f"cannot be imported: {error}", fix="pip install 'trtpipe[triton]'"
            )
        ) from error
    return grpc, service_pb2, service_pb2_grpc


def _add_input(request: Any, name: str, value: Any) -> None:
    """Add one input of shape [1, n]."""
    values = list(value) if isinstance(value, tuple) else [value]
    wire_type, field = _WIRE[_DATA_TYPES[name]]
    if wire_type == "BYTES":
        values = [one.encode("utf-8") if isinstance(one, str) else one for one in values]
    tensor = request.inputs.add(name=name, datatype=wire_type, shape=[1, len(values)])
    getattr(tensor.contents, field).extend(values)


def _outputs(response: Any) -> dict[str, Any]:
    """Name -> the only element of each output."""
    outputs: dict[str, Any] = {}
    for tensor, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        if tensor.datatype == "BYTES":  # four bytes of length, then the text
            outputs[tensor.name] = raw[4:].decode("utf-8")
        else:
            outputs[tensor.name] = int.from_bytes(raw, "little", signed=True)
    return outputs


def _refusal(address: str, reason: str) -> RequestError | StageError:
    # Errors in a stream carry a text but no status. The header `triton_grpc_error` would add one, but
    # it crashes server 2.51 (segmentation fault within a few wrong requests), so the text must tell.
    kind = StageError if is_server_fault(reason) else RequestError
    return kind(Problem(f"{address} answers", reason))


def _rpc_error(grpc: Any, address: str, error: Any, timeout_s: float) -> PipelineError:
    code = error.code()
    if code is grpc.StatusCode.UNAVAILABLE:
        return not_reachable(address, error.details())
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return ToolError(Problem(address, f"no answer within {timeout_s:g} s"))
    return StageError(Problem(f"{address} answers {code.name}", error.details()))
