"""A model's repository on the Hugging Face hub: requests that are repeated, and errors in one line.

huggingface_hub finds the endpoint (HF_ENDPOINT) and the token (HF_TOKEN, `hf auth login`).
"""

import contextlib
import random
import re
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

import huggingface_hub  # imports its parts when they are used

from nanochat.common import UserError, first_line, get_network_seconds, on_terminal, warn
from nanochat.data.download import MAX_DELAY_SECONDS, UNREACHED_ATTEMPTS, brief, status_of

Result = TypeVar("Result")

LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


@dataclass
class Hub:
    """The repository `name`, which must be USER/NAME; UserError for other names."""

    name: str
    to_write: bool  # whether it is to be written to: for the words of errors
    endpoint: str | None = None  # None: HF_ENDPOINT, else https://huggingface.co
    delay_seconds: float = 1.0  # before the second attempt; doubled after each
    reached: bool = False  # the hub has answered once
    api: Any = field(init=False)

    def __post_init__(self) -> None:
        check_name(self.name)
        self.api = huggingface_hub.HfApi(self.endpoint, library_name="nanochat")

    @property
    def host(self) -> str:
        return urlsplit(self.api.endpoint).netloc or self.api.endpoint

    @property
    def url(self) -> str:
        """The address of the model's page."""
        return f"{self.api.endpoint}/{self.name}"

    @property
    def login(self) -> str:
        """How to get a token that is enough."""
        return f"{LOGIN} (a token that may write: {self.api.endpoint}/settings/tokens)" if self.to_write else LOGIN

    def call(self, action: Callable[[], Result]) -> Result:
        """The result of `action`, repeated while the network or the hub fails, for NANOCHAT_NETWORK_SECONDS.

        Raises UserError; an OSError of this machine as it is.
        """
        from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

        began, failures = time.monotonic(), 0
        while True:
            try:
                result = action()
                self.reached = True
                return result
            except UserError:
                raise
            except (TypeError, LookupError, AttributeError) as error:  # of the library, about an answer of another form
                raise UserError(f"{self.host} answers something else than a hub does: {first_line(error)}") from error
            except (HTTPError, OSError, RuntimeError, ValueError) as error:
                cause = cause_of(error)
                if isinstance(cause, OfflineModeIsEnabled):
                    raise UserError("HF_HUB_OFFLINE is set: unset it to reach the hub") from error
                if isinstance(cause, OSError) and cause.errno and not isinstance(cause, ConnectionError):
                    raise cause from error
                status = status_in(cause)
                self.reached |= status is not None
                failures += 1
                patient = time.monotonic() - began < get_network_seconds()
                patient &= self.reached or failures < UNREACHED_ATTEMPTS
                if not patient or not is_temporary(cause):
                    raise UserError(self.explain(cause)) from error
                delay = min(MAX_DELAY_SECONDS, self.delay_seconds * 2 ** (failures - 1)) * random.uniform(0.75, 1.25)
                warn(f"{self.host}: {brief(cause)}; next attempt in {delay:.1f} s")
            time.sleep(delay)

    def explain(self, error: Exception) -> str:
        """One line for the user: what failed, and the fix."""
        from huggingface_hub import errors

        status = status_in(error)
        if isinstance(error, errors.GatedRepoError):
            return f"{self.name} is gated: ask for access at {self.url}, and {LOGIN}"
        if isinstance(error, errors.RevisionNotFoundError):
            return f"{self.name} has no such revision; its branches and commits are at {self.url}/commits/main"
        if status == 401 and (self.to_write or not isinstance(error, errors.RepositoryNotFoundError)):
            return f"{self.host} does not accept the token (401); {self.login}"
        if status in (401, 404):
            fix = "is it shared with you?" if huggingface_hub.get_token() else f"if it is private, {LOGIN}"
            return f"{self.host} shows no model {self.name} ({status}); check the name; {fix}"
        if status == 403 and self.to_write:
            return f"the token may not write to {self.name} (403); take a name of your own, or {self.login}"
        if status in (409, 412):
            return f"{self.name} was changed meanwhile ({status}); look at {self.url}, and push again"
        again = "run the command again" + ("; nothing was published, and what arrived is kept" * self.to_write)
        if status:
            said = first_line(Exception(getattr(error, "server_message", None) or f"HTTP {status}"))
            return f"{self.host}: {said} ({status})" + (f"; {again}" if is_temporary(error) else "")
        if isinstance(error, errors.HTTPError | ConnectionError):
            return f"cannot reach {self.host} ({brief(error)}); check the network, and {again}"
        return f"{self.host}: {first_line(error)}"


def check_name(name: str) -> None:
    """Raise UserError unless `name` can be a model on the hub: USER/NAME."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    with contextlib.suppress(HFValidationError):
        validate_repo_id(name)
        if "/" in name:
            return
    raise UserError(
        f"{name!r} is no name of a model on the hub: USER/NAME, of letters, digits, '-', '_' and '.', at most 96 in all"
    )


def cause_of(error: Exception) -> Exception:
    """The network's error behind an error of the client (`raise RuntimeError(...) from error`), else the error."""
    from huggingface_hub.errors import HTTPError

    found: BaseException | None = error
    while found is not None and not isinstance(found, HTTPError | ConnectionError):
        found = found.__cause__
    return found if isinstance(found, Exception) else error


XET_STATUS = re.compile(r"HTTP status \w+ error \((\d{3})")  # hf_xet's errors have no other sign of it


def status_in(error: Exception) -> int | None:
    """The HTTP status of an error, of hf_xet too; None if there was no response."""
    found = XET_STATUS.search(str(error)) if isinstance(error, ConnectionError) else None
    return int(found[1]) if found else status_of(error)


def is_temporary(error: Exception) -> bool:
    """Whether another attempt may help: no response, too many requests, an error of the server."""
    from huggingface_hub.errors import HTTPError

    status = status_in(error)
    network = isinstance(error, HTTPError | ConnectionError)
    return network and (status is None or status in (408, 425, 429) or status >= 500)


def lacks_xet(error: ConnectionError) -> bool:
    """Whether the hub has no Xet storage, as most copies of the hub have none."""
    return status_in(error) == 404 and "xet-write-token" in str(error)


def quiet_progress() -> None:
    """Turn the library's progress bars off where there is no terminal, unless the user has decided."""
    if not on_terminal() and huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        huggingface_hub.utils.disable_progress_bars()


@contextlib.contextmanager
def library_warnings() -> Iterator[None]:
    """Print the library's warnings as ours, a line each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        warn(" ".join(str(warning.message).split()))
