"""The command line: verbs over plan and run. Imports nothing heavy at start-up."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pipeline
from pipeline.errors import (
    ConfigError,
    ExitCode,
    GateError,
    PipelineError,
    Problem,
    StageError,
    error_to_json,
)

_Handler = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; every user error becomes a message and an exit code."""
    typed = sys.argv[1:] if arguments is None else list(arguments)
    try:
        options = _parser().parse_args(typed)
        with _interrupted_by(signal.SIGTERM, signal.SIGHUP):
            return int(options.handler(options))
    except PipelineError as error:
        from pipeline.console import print_error

        print_error(error)
        if "--json" in typed:
            _print_json(error_to_json(error))
        return int(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted; nothing half-written is left", file=sys.stderr)
        return int(ExitCode.INTERRUPTED)
    except BrokenPipeError:  # `trtpipe plan | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(ExitCode.DONE)


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line like every other mistake, as text or as JSON."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(Problem(self.prog, message, fix=f"{self.prog} --help"))


@contextlib.contextmanager
def _interrupted_by(*signals: signal.Signals) -> Iterator[None]:
    """Let these end a command as Ctrl-C does: children ended, nothing half-written left."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="trtpipe", description=pipeline.__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_build_verb(
        verbs, "plan", _plan, "say what would happen, and every problem, without doing it"
    )
    _add_build_verb(
        verbs, "run", _run, "make what is missing and publish engine and model repository"
    )
    _add_build_verb(verbs, "explain", _explain, "say field by field why each stage would run")
    for name, handler, text in (
        ("show", _show, "facts of a published engine"),
        ("verify", _verify, "check every published file and show the quality report"),
        ("serve", _serve, "start Triton on a published model repository"),
    ):
        _add_verb(verbs, name, handler, text, "CONFIG_OR_DIR")
    _add_client(verbs)
    return parser


def _add_verb(
    verbs: Any, name: str, handler: _Handler, text: str, subject: str
) -> argparse.ArgumentParser:
    verb: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text)
    verb.add_argument("subject", metavar=subject, type=Path)
    verb.add_argument("--json", action="store_true", help="one JSON document on standard output")
    verb.set_defaults(handler=handler)
    return verb


def _add_build_verb(verbs: Any, name: str, handler: _Handler, text: str) -> None:
    verb = _add_verb(verbs, name, handler, text, "CONFIG")
    verb.add_argument(
        "--weights",
        metavar="DIR|synthetic",
        help="other weights for this build: a local directory, or seeded random ones",
    )


def _add_client(verbs: Any) -> None:
    text = "ask a running server"
    verb = _add_verb(verbs, "client", _client, text, "CONFIG_OR_DIR")
    verb.add_argument("prompt", help="text; - reads standard input")
    verb.add_argument("--protocol", choices=("http", "grpc"), default="http")
    verb.add_argument("--stream", action="store_true", help="print text as it is generated")
    verb.add_argument("--max-tokens", type=int, default=64)
    verb.add_argument("--temperature", type=float, help="0 (greedy) unless given")
    verb.add_argument("--top-k", type=int)
    verb.add_argument("--top-p", type=float)
    verb.add_argument("--seed", type=int)
    verb.add_argument("--stop", action="append", default=[], metavar="TEXT")


def _load(options: argparse.Namespace) -> Any:
    from pipeline.config import load_config

    loaded = load_config(options.subject)
    if options.weights:
        from pipeline.weights import override_weights

        loaded = override_weights(loaded, options.weights)
    return loaded


def _workspace() -> Any:
    from pipeline.workspace import Workspace

    return Workspace(Path.cwd())


def _plan(options: argparse.Namespace) -> int:
    from pipeline.console import print_error, stdout_console
    from pipeline.plan import make_plan
    from pipeline.render import plan_json, print_plan

    workspace = _workspace()
    plan = make_plan(_load(options), workspace.store, workspace.digests())
    if options.json:
        _print_json(plan_json(plan))
    else:
        print_plan(plan, _reasons(plan, workspace), stdout_console())
    try:
        plan.raise_problems()
    except PipelineError as error:  # already part of the JSON document
        print_error(error)
        return int(error.exit_code)
    return int(ExitCode.DONE)


def _run(options: argparse.Namespace) -> int:
    from pipeline.console import ConsoleView
    from pipeline.run import run

    view = ConsoleView()
    try:
        result = run(_load(options), _workspace(), view)
    finally:
        view.close()
    if options.json:
        _print_json(
            {
                "engine_dir": str(result.engine_dir),
                "repository_dir": str(result.repository_dir),
                "executed": list(result.executed),
                "published": result.published,
                "facts": {name: artifact.facts for name, artifact in result.artifacts.items()},
            }
        )
        return int(ExitCode.DONE)
    state = "published" if result.published else "nothing to do"
    print(f"{state}: {_relative(result.engine_dir)} and {_relative(result.repository_dir)}")
    return int(ExitCode.DONE)


def _explain(options: argparse.Namespace) -> int:
    from pipeline.plan import make_plan

    workspace = _workspace()
    reasons = _reasons(make_plan(_load(options), workspace.store, workspace.digests()), workspace)
    if options.json:
        _print_json(reasons)
        return int(ExitCode.DONE)
    for stage, lines in reasons.items():
        print(f"{stage}: {'up to date' if not lines else 'would run'}")
        for line in lines:
            print(f"    {line}")
    return int(ExitCode.DONE)


def _reasons(plan: Any, workspace: Any) -> dict[str, list[str]]:
    """Why each stage would run, compared with what is published under the plan's name, if anything."""
    from pipeline.explain import explain

    path = workspace.engines_dir / plan.loaded.config.name / "manifest.json"
    try:
        published = json.loads(path.read_text("utf-8"))["actions"]
    except (OSError, ValueError, KeyError, TypeError):
        published = {}
    return explain(plan, workspace.store, published)


def _published(subject: Path, parent: str) -> tuple[Path, dict[str, Any]]:
    """Directory and manifest of something published, from its config or its directory.

    Raises:
        StageError: it has not been published.
        GateError: its manifest is not readable.
    """
    if subject.is_dir():
        directory = subject
    else:
        from pipeline.config import load_config

        directory = getattr(_workspace(), parent) / load_config(subject).config.name
    path = directory / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        fix = "make engine MODEL=<name>, or `trtpipe run CONFIG`"
        raise StageError(
            Problem(str(directory), "is not published (no manifest.json)", fix=fix)
        ) from None
    except json.JSONDecodeError as error:
        raise GateError(Problem(str(path), f"is not JSON: {error.msg}", fix="run again")) from None
    return directory, manifest


def _show(options: argparse.Namespace) -> int:
    directory, manifest = _published(options.subject, "engines_dir")
    if options.json:
        _print_json(manifest)
        return int(ExitCode.DONE)
    from pipeline.console import stdout_console
    from pipeline.render import print_manifest

    print_manifest(directory, manifest, stdout_console())
    return int(ExitCode.DONE)


def _verify(options: argparse.Namespace) -> int:
    from pipeline.publish import damaged_files

    directory, manifest = _published(options.subject, "engines_dir")
    problems = damaged_files(directory, manifest)
    if problems:
        raise GateError(problems)
    report = json.loads((directory / "report.json").read_text("utf-8"))
    if options.json:
        _print_json({"files": len(manifest["files"]), "report": report})
        return int(ExitCode.DONE)
    print(f"{len(manifest['files'])} files as published (sha256)")
    for name, value in manifest["facts"]["verify"].items():
        print(f"{name}: {value}")
    return int(ExitCode.DONE)


def _serve(options: argparse.Namespace) -> int:
    from pipeline.serving.command import serve

    directory, manifest = _published(options.subject, "repositories_dir")
    config = _serve_config(options.subject, manifest)
    serve(directory, manifest["facts"]["serve"]["model_name"], config, as_json=options.json)
    return int(ExitCode.DONE)


def _serve_config(subject: Path, manifest: dict[str, Any]) -> Any:
    """Ports and host: today's YAML if one was given, else what was published."""
    from pipeline.config import ServeConfig, load_config

    if subject.is_dir():
        return ServeConfig.model_validate(manifest["config"]["serve"])
    return load_config(subject).config.serve


def _client(options: argparse.Namespace) -> int:
    from pipeline.serving.client import AskOptions
    from pipeline.serving.command import ask_and_print

    _, manifest = _published(options.subject, "repositories_dir")
    ask_and_print(
        sys.stdin.read() if options.prompt == "-" else options.prompt,
        manifest["facts"]["serve"]["model_name"],
        _serve_config(options.subject, manifest),
        protocol=options.protocol,
        options=AskOptions(
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
            stop_words=tuple(options.stop),
        ),
        stream=options.stream,
        as_json=options.json,
    )
    return int(ExitCode.DONE)


def _relative(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, sort_keys=True))


if __name__ == "__main__":
    sys.exit(main())
