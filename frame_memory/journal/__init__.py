"""The journal: finished sections on disk, enough to resume, re-roll or branch. Knows torch, never comfy or nodes."""

from .files import DiskFull, FileRecord, JournalError, check_space, safe_name, verify, write_durable
from .fingerprint import fingerprint
from .lock import ProjectLock, ProjectLocked
from .manifest import Manifest, SectionRecord, UnreadableManifest, difference, read_manifest, write_manifest
from .project import IF_CHANGED, Project, ProjectConflict, list_projects, locate, section_name

__all__ = [
    "IF_CHANGED",
    "DiskFull",
    "FileRecord",
    "JournalError",
    "Manifest",
    "Project",
    "ProjectConflict",
    "ProjectLock",
    "ProjectLocked",
    "SectionRecord",
    "UnreadableManifest",
    "check_space",
    "difference",
    "fingerprint",
    "list_projects",
    "locate",
    "read_manifest",
    "safe_name",
    "section_name",
    "verify",
    "write_durable",
    "write_manifest",
]
