"""Checkpoints on the Hugging Face Hub: uploaded in the background, one commit each."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from lib.files import UserError, first_line

# one at a time: two commits to a repository at once conflict
_uploads = ThreadPoolExecutor(1, "hub")


def check_hub(repo: str, token: str | None = None, private: bool = True):
    """Make the Hub model repository `repo` ("user/name") unless it exists.

    UserError if that is not allowed.
    """
    import huggingface_hub as hub

    try:
        hub.HfApi(token=token).create_repo(repo, private=private, exist_ok=True)
    except Exception as e:
        raise _explained(repo, e) from e


def _explained(repo: str, error: Exception) -> UserError:
    """What the Hub's client raised, as one sentence with a cure."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    advice = "check the name"
    if status in (401, 403):
        advice = (
            "the token is wrong, has run out or may not write there: make one with write access "
            "at https://huggingface.co/settings/tokens"
        )
    elif status is None or status >= 500:
        advice = "check the name and the network"
    return UserError(f"cannot upload to the Hub repository {repo} ({first_line(error)}): {advice}")


def upload_to_hub(folder, repo: str, token: str | None = None, private: bool = True) -> Future:
    """Upload the files of `folder` to the root of a Hub repository, in the background.

    Returns a Future of the commit's address. A failure (wrong token, no network, the folder pruned
    meanwhile) is one printed sentence, and the Future holds None. `restore("hf://user/name")` reads
    an uploaded checkpoint.
    """
    import huggingface_hub as hub

    def upload():
        try:
            check_hub(repo, token, private)
            commit = hub.HfApi(token=token).upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message=f"upload {Path(folder).name}",
            )
            return str(commit)
        except Exception as e:
            told = e if isinstance(e, UserError) else _explained(repo, e)
            print(f"warning: {told}")
            return None

    return _uploads.submit(upload)
