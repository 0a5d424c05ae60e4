# For pyright only. Linen types `apply` as a union with a tuple that no call of ours returns: every
# use would need a cast. So Linen is untyped here.
from typing import Any

def __getattr__(name: str) -> Any: ...
