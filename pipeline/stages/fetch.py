"""fetch: make the weights available as one directory in Hugging Face layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.config import DemoSource, DirectorySource, HubSource, LoadedConfig, SyntheticSource
from pipeline.demo import MODEL_DIR
from pipeline.errors import CheckpointError, Problem, ToolError
from pipeline.external import CHECKPOINT_PATTERNS, checkpoint_files
from pipeline.links import circle_problem, resolved
from pipeline.stages.stage import StageContext, StageDefaults


def local_directory(loaded: LoadedConfig) -> Path | None:
    """Where the weights lie already; None for a download or synthetic weights."""
    model = loaded.config.model
    if isinstance(model, DemoSource):
        return MODEL_DIR
    if isinstance(model, DirectorySource):
        return loaded.resolve(model.path, "model", "path")
    return None


class Fetch(StageDefaults):
    """Links a local directory, downloads a pinned Hub revision, or makes synthetic weights."""

    name = "fetch"
    version = 1

    def config_subset(self, loaded: LoadedConfig) -> dict[str, Any]:
        """The source; of a local directory its content counts, not its path."""
        model = loaded.config.model
        if local_directory(loaded) is not None:
            return {"source": "local"}
        return model.model_dump(mode="json", exclude={"shape"} if model.source == "hub" else set())

    def external_files(self, loaded: LoadedConfig) -> dict[str, list[Path]]:
        """Every file of a local checkpoint; of synthetic weights, the tokenizer lent to them."""
        directory = local_directory(loaded)
        if directory is not None:
            return {path.name: [path] for path in checkpoint_files(directory)}
        if isinstance(loaded.config.model, SyntheticSource):
            return {path.name: [path] for path in _lent_tokenizer()}
        return {}

    def is_current(self, loaded: LoadedConfig, artifact_dir: Path) -> bool:
        """Links must lead to the directory whose content was hashed, not to an equal one elsewhere."""
        directory = local_directory(loaded)
        if directory is None:
            return True
        links = [*artifact_dir.glob("*.safetensors"), *artifact_dir.glob("*.bin")]
        return all(resolved(link) == resolved(directory / link.name) for link in links)

    def run(self, context: StageContext) -> dict[str, Any]:
        """Fill the artifact; local files are linked, not copied."""
        model = context.loaded.config.model
        directory = local_directory(context.loaded)
        if directory is not None:
            link_local(directory, context.out_dir)
        elif isinstance(model, HubSource):
            _download(model, context)
        elif isinstance(model, SyntheticSource):
            _synthesize(model, context)
        total = sum(path.stat().st_size for path in context.out_dir.iterdir() if path.is_file())
        return {"bytes": total, "source": model.source}


def link_local(directory: Path, out_dir: Path) -> None:
    """Symbolic links to every file that counts: a checkpoint of 26 GB is not copied.

    Raises:
        CheckpointError: the directory is missing, has no config.json, or is a link in a circle.
    """
    if not (directory / "config.json").is_file():
        raise CheckpointError(no_checkpoint(directory))
    for path in checkpoint_files(directory):
        (out_dir / path.name).symlink_to(path.resolve())


def no_checkpoint(directory: Path) -> Problem:
    """The problem of a directory that is not a checkpoint."""
    circle = circle_problem(directory / "config.json")
    if circle is not None:
        return circle
    what = "no such directory" if not directory.is_dir() else "holds no config.json"
    return Problem(
        str(directory),
        what,
        "a directory in Hugging Face layout: config.json, *.safetensors, tokenizer.json",
    )


def _download(model: HubSource, context: StageContext) -> None:
    """Through huggingface_hub's own cache, which resumes broken downloads and is shared with others."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"{model.id} at {model.revision[:12]}"
    try:
        cached = snapshot_download(
            model.id, revision=model.revision, allow_patterns=list(CHECKPOINT_PATTERNS)
        )
    except GatedRepoError:
        raise ToolError(_gated(where, model)) from None
    except RevisionNotFoundError:
        fix = "copy the commit hash from the model's history"
        raise ToolError(Problem(where, "the Hub has no such revision", fix=fix)) from None
    except RepositoryNotFoundError:
        fix = "check the id; for a private model run `huggingface-cli login`"
        raise ToolError(Problem(where, "the Hub has no such model", fix=fix)) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ToolError(_refused(where, error.__cause__) or _unreachable(where, error)) from None
    except HfHubHTTPError as error:
        raise ToolError(_refused(where, error) or _broken_off(where, error)) from None
    except OSError as error:
        raise ToolError(_broken_off(where, error)) from None
    link_local(Path(cached), context.out_dir)


def _gated(where: str, model: HubSource) -> Problem:
    return Problem(
        where,
        "access to this model is restricted",
        fix=f"accept the licence at https://huggingface.co/{model.id}, then `huggingface-cli login` "
        f"or set HF_TOKEN; {_ELSEWHERE}",
    )


def _refused(where: str, error: BaseException | None) -> Problem | None:
    """What the Hub answers to a token that is wrong or may not read the model; the client says less."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status not in (401, 403):
        return None
    fix = f"check that your token may read this model: `huggingface-cli login`; {_ELSEWHERE}"
    return Problem(where, f"the Hub refuses it with status {status}", fix=fix)


def _broken_off(where: str, error: OSError) -> Problem:
    fix = "run again: it goes on where it stopped"
    return Problem(where, f"the download broke off ({error})", fix=fix)


def _unreachable(where: str, error: Exception) -> Problem:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return Problem(
        where,
        f"the Hub cannot be reached and the model is not in the local cache ({reason})",
        fix=f"go online and run again (a broken download resumes), {_ELSEWHERE}",
    )


_ELSEWHERE = "or point at a local copy: WEIGHTS=<dir>, or rehearse with WEIGHTS=synthetic"


def _synthesize(model: SyntheticSource, context: StageContext) -> None:
    """Random weights, and the demo's tokenizer as a stand-in: without weights nobody has another."""
    from pipeline.checkpoint.synthetic import write_synthetic

    write_synthetic(model.shape, context.out_dir, seed=model.seed, progress=context.progress)
    for path in _lent_tokenizer():
        (context.out_dir / path.name).symlink_to(path.resolve())


def _lent_tokenizer() -> list[Path]:
    names = ("tokenizer", "special_tokens")
    return [path for path in checkpoint_files(MODEL_DIR) if path.name.startswith(names)]
