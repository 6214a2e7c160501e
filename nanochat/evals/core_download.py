"""Download the CORE bundle."""

import shutil
import tempfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

from filelock import FileLock

from nanochat.common import UserError, say

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
TIMEOUT_SECONDS = 30.0  # without a byte


def bundle_folder(given: str, base_dir: Path, url: str = BUNDLE_URL) -> Path:
    """The folder `given` with --eval-bundle, else eval_bundle/ in the base folder, downloaded if it is not there."""
    if given:
        if not Path(given).is_dir():
            raise UserError(f"--eval-bundle={given}: there is no such folder")
        return Path(given)
    folder = base_dir / "eval_bundle"
    with FileLock(base_dir / ".eval_bundle.lock"):
        if not folder.is_dir():
            download_bundle(folder, url)
    return folder


def download_bundle(folder: Path, url: str) -> None:
    """Download and unpack; `folder` appears only when complete."""
    say(f"downloading the CORE bundle from {url}")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".eval_bundle.") as work:
        archive = Path(work) / "bundle.zip"
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as source, open(archive, "wb") as file:
                shutil.copyfileobj(source, file)
            with zipfile.ZipFile(archive) as bundle:
                bundle.extractall(Path(work) / "unpacked")  # zipfile confines absolute paths and .. to the folder
        except (urllib.error.URLError, TimeoutError, ConnectionError, zipfile.BadZipFile, OSError) as error:
            raise UserError(
                f"cannot download the CORE bundle from {url} ({error}); get it where there is a network, "
                f"and put it into {folder} or name it with --eval-bundle"
            ) from error
        found = next((path.parent for path in sorted(Path(work).rglob("core.yaml"))), None)
        if found is None:
            raise UserError(f"{url} holds no core.yaml: not a CORE bundle")
        found.rename(folder)
