"""The web page: three static files that talk to the server's own API. No framework, no build step.

The page loads nothing from elsewhere. `HEADERS` hold it to that: only its own files run, and it
connects to its own server alone.
"""

from __future__ import annotations

import importlib.resources

_MEDIA_TYPES = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
}

_POLICY = (
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "img-src 'self' data: blob:",
    "connect-src 'self'",
    "form-action 'none'",
    "base-uri 'none'",
    "frame-ancestors 'none'",
    "require-trusted-types-for 'script'",
)

HEADERS = {
    "Content-Security-Policy": "; ".join(_POLICY),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

FILES = {
    name: (importlib.resources.files(__name__).joinpath(name).read_bytes(), media_type)
    for name, media_type in _MEDIA_TYPES.items()
}
"""Name -> (bytes, media type). The root path serves index.html."""
