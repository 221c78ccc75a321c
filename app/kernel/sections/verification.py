"""The section `verification` of the settings: what verifiers may do."""

from __future__ import annotations

from typing import Literal

from app.kernel.sections.section import Section


class VerificationSettings(Section):
    """The verifiers of refine, ensemble and verify steps. It must be equal for all control workers."""

    #: Code that models wrote is run with its tests in a process that is `confined` by the kernel (Landlock and
    #: seccomp), and refused where the kernel cannot; or also there, with limits of time and memory only
    #: (`unprotected`); or never (`off`).
    code_tests: Literal["confined", "unprotected", "off"] = "confined"
