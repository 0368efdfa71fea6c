"""One file of a Hub dataset, through huggingface_hub's own cache. Nothing here runs in a plan."""

from __future__ import annotations

from pathlib import Path

from pipeline.calibration_config import HubFile
from pipeline.errors import Problem, ToolError


def download_dataset_file(wanted: HubFile) -> Path:
    """The local path of the file; downloaded once, resumed when it broke off, then found offline.

    Raises:
        ToolError: access is restricted, there is no such dataset, revision or file, or the Hub cannot
            be reached and the file is not in the cache.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"dataset {wanted.hub} at {wanted.revision[:12]}"
    try:
        return Path(
            hf_hub_download(wanted.hub, wanted.file, repo_type="dataset", revision=wanted.revision)
        )
    except GatedRepoError:
        what = "access to this dataset is restricted"
        fix = "accept its conditions on the dataset's page, then `huggingface-cli login`"
    except RevisionNotFoundError:
        what, fix = "the Hub has no such revision", "copy the commit hash from its history"
    except RepositoryNotFoundError:
        what = "the Hub has no such dataset"
        fix = "check owner/name; for a private dataset run `huggingface-cli login`"
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        what, fix = _not_reached(error, wanted.file)
    except EntryNotFoundError:
        what = f"the dataset has no file {wanted.file!r} at this revision"
        fix = "copy the path from the dataset's page, Files"
    except HfHubHTTPError as error:
        what, fix = _refused(error, wanted.file)
    except OSError as error:
        what = f"the download of {wanted.file} broke off ({_first_line(error)})"
        fix = "run again: it goes on where it stopped"
    raise ToolError(Problem(where, what, fix=fix))


def _not_reached(error: Exception, file: str) -> tuple[str, str]:
    """What and fix; the client calls it unreachable, too, when the Hub did answer, but not well."""
    cause = error.__cause__ or error
    if _status(cause) in (401, 403):
        return _refused(cause, file)
    return (
        f"the Hub cannot be reached and {file} is not in the local cache ({_first_line(cause)})",
        "go online and run again, or download the file and give its path as `data:`",
    )


def _refused(error: BaseException, file: str) -> tuple[str, str]:
    return (
        f"the Hub refuses {file} with status {_status(error)}",
        "check that your token may read this dataset: `huggingface-cli login`",
    )


def _status(error: BaseException) -> int | None:
    status: int | None = getattr(getattr(error, "response", None), "status_code", None)
    return status


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
