"""Checkpoints on the Hugging Face Hub: uploaded in the background, one commit each."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from lib.files import first_line
from lib.hub import client, make, reaching

# one at a time: two commits to a repository at once conflict
_uploads = ThreadPoolExecutor(1, "hub")


def check_hub(repo: str, token: str | None = None, private: bool = True):
    """Make the Hub model repository `repo` ("user/name") unless it exists.

    UserError if that is not allowed.
    """
    with reaching(f"cannot upload to the Hub repository {repo}", token):
        make(repo, token, private)


def upload_to_hub(folder, repo: str, token: str | None = None, private: bool = True) -> Future:
    """Upload the files of `folder` to the root of a Hub repository, in the background.

    Returns a Future of the commit's address. A failure (wrong token, no network, the folder pruned
    meanwhile) is one printed sentence, and the Future holds None. `restore("hf://user/name")` reads
    an uploaded checkpoint.
    """

    def upload():
        try:
            check_hub(repo, token, private)
            with reaching(f"cannot upload to the Hub repository {repo}", token):
                commit = client(token).upload_folder(
                    repo_id=repo,
                    folder_path=folder,
                    commit_message=f"upload {Path(folder).name}",
                )
            return str(commit)
        except Exception as e:
            print(f"warning: {first_line(e)}")
            return None

    return _uploads.submit(upload)
