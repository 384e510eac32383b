"""Progress bars, by tqdm where it is installed."""

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def track(iterable: Iterable[T], description: str, enabled: bool) -> Iterable[T]:
    """Iterates with a progress bar on standard error, which vanishes when it is done."""
    if not enabled:
        return iterable
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return iterable
    return tqdm(iterable, desc=description, leave=False)  # type: ignore[no-any-return]
