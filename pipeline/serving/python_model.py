"""The model that Triton's python backend runs: requests in, text out, over one Session.

`execute` only checks and queues; the scheduler's thread generates and sends the responses. Imported
inside Triton's stub process only, which provides `triton_python_backend_utils`.
"""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from pipeline.errors import PipelineError, Problem, RequestError, StageError
from pipeline.runtime.generation import FinishReason, TokenEvent
from pipeline.runtime.requests import GenerationRequest
from pipeline.runtime.scheduler import Scheduler
from pipeline.runtime.session import Session

REQUIRED_INPUTS = ("text_input", "max_tokens")


class TritonPythonModel:
    """What the python backend looks for; the method names are its."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the engine. An error ends up as the reason why the model is not loaded."""
        config = json.loads(args["model_config"])
        self._input_names = [tensor["name"] for tensor in config["input"]]
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        version_dir = Path(args["model_repository"]) / args["model_version"]
        self._session = Session(
            version_dir / parameters["engine_dir"],
            num_slots=_optional_int(parameters, "num_slots"),
            num_threads=_optional_int(parameters, "num_threads"),
        )
        self._scheduler = Scheduler(self._session)
        self._scheduler.start()

    def execute(self, requests: list[Any]) -> None:
        """Queue requests. Each answers through its own sender, wrong ones at once."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._queue(request, sender)
            except PipelineError as error:
                _send_error(sender, error)
            # A bug: its request gets an answer, too, and so do those after it.
            except Exception:  # noqa: BLE001
                pb_utils.Logger.log_error(traceback.format_exc())
                problem = Problem(
                    "server", "an unexpected error in this request", fix="see the server's log"
                )
                _send_error(sender, StageError(problem))

    def finalize(self) -> None:
        """Triton has waited for the running requests already; end the thread."""
        self._scheduler.stop()

    def _queue(self, request: Any, sender: Any) -> None:
        _refuse_missing_inputs(request)
        self._refuse_unknown_fields(request)
        text = _scalar(request, "text_input")
        asked = GenerationRequest(
            prompt=text,
            max_tokens=int(_scalar(request, "max_tokens")),
            temperature=_optional(float, _scalar(request, "temperature")),
            top_k=int(_scalar(request, "top_k", 0)),
            top_p=float(_scalar(request, "top_p", 1.0)),
            seed=_optional(int, _scalar(request, "seed")),
            stop_words=_texts(request, "stop_words"),
        )
        prepared = self._session.prepare(asked)
        echo = "" if _scalar(request, "exclude_input_in_output", True) else text.decode("utf-8")
        sink = ResponseSink(sender, echo, streams=bool(_scalar(request, "stream", False)))
        self._scheduler.submit(prepared, sink)

    def _refuse_unknown_fields(self, request: Any) -> None:
        """The generate endpoint turns JSON fields that it does not know into request parameters."""
        try:
            parameters = json.loads(request.parameters() or "{}")
        except UnicodeDecodeError as error:
            raise RequestError(Problem("request", f"a field is not UTF-8: {error}")) from error
        own = (
            "id",
        )  # a field of the generate protocol that server 2.51 passes through like others
        unknown = [
            name for name in parameters if name not in own and not name.startswith("triton_")
        ]
        if unknown:
            allowed = ", ".join(self._input_names)
            raise RequestError(Problem(name, "unknown field", allowed) for name in unknown)


class ResponseSink:
    """Sends the events of one request as Triton responses: each at once, or all in one at the end.

    Args:
        sender: the request's response sender.
        echo: text put in front of the answer.
        streams: several responses, or exactly one, as plain `generate` needs.
    """

    def __init__(self, sender: Any, echo: str, *, streams: bool) -> None:
        self._sender = sender
        self._text = echo
        self._streams = streams
        self._gone = False

    def is_cancelled(self) -> bool:
        """The client cancelled or vanished."""
        return self._gone or bool(self._sender.is_cancelled())

    def send(self, event: TokenEvent) -> None:
        """Collect the text, and send it when there is some and it is time."""
        self._text += event.text
        if event.finish_reason is FinishReason.CANCELLED:
            self._respond(error=pb_utils.TritonError("cancelled", pb_utils.TritonError.CANCELLED))
        elif event.finish_reason is not None:
            self._respond(
                _text_tensor("text_output", self._text),
                _text_tensor("finish_reason", event.finish_reason.value),
                _count_tensor("num_input_tokens", event.num_input_tokens),
                _count_tensor("num_output_tokens", event.num_output_tokens),
            )
        elif self._streams and self._text:
            self._respond(_text_tensor("text_output", self._text), is_last=False)
            self._text = ""

    def fail(self, error: PipelineError) -> None:
        """Answer with an error."""
        self._respond(error=_triton_error(error))

    def _respond(self, *tensors: Any, error: Any = None, is_last: bool = True) -> None:
        if self._gone:
            return
        flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if is_last else 0
        try:
            self._sender.send(pb_utils.InferenceResponse(list(tensors), error), flags=flags)
        except pb_utils.TritonModelException as exception:
            self._gone = True  # nobody to answer: the next poll frees the slot
            pb_utils.Logger.log_info(f"a response could not be sent: {exception}")


def _refuse_missing_inputs(request: Any) -> None:
    """Triton counts inputs: an optional one makes up for a required one that is missing."""
    missing = [name for name in REQUIRED_INPUTS if _scalar(request, name) is None]
    if missing:
        raise RequestError(Problem(name, "it is missing", fix="send it") for name in missing)


def _send_error(sender: Any, error: PipelineError) -> None:
    response = pb_utils.InferenceResponse([], _triton_error(error))
    sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _triton_error(error: PipelineError) -> Any:
    if isinstance(error, RequestError):
        return pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
    # gRPC streams carry the text only: this prefix is how clients tell whose fault it is.
    return pb_utils.TritonError(f"internal error: {error}", pb_utils.TritonError.INTERNAL)


def _scalar(request: Any, name: str, default: Any = None) -> Any:
    """The only element of an input; `default` when the request leaves it out."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return default if tensor is None else tensor.as_numpy().reshape(-1)[0]


def _texts(request: Any, name: str) -> tuple[bytes, ...]:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return () if tensor is None else tuple(tensor.as_numpy().reshape(-1))


def _text_tensor(name: str, text: str) -> Any:
    return pb_utils.Tensor(name, np.array([[text.encode("utf-8")]], dtype=np.object_))


def _count_tensor(name: str, count: int) -> Any:
    return pb_utils.Tensor(name, np.array([[count]], dtype=np.int32))


def _optional(kind: type, value: Any) -> Any:
    return None if value is None else kind(value)


def _optional_int(parameters: dict[str, str], name: str) -> int | None:
    return int(parameters[name]) if name in parameters else None
