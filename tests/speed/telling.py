"""A side's server without an engine, that tells where it runs."""

import os
import sys

from harness.speed import serving


class Server(serving.Server):
    """Answers where it is, and puts itself where it is asked to."""

    @staticmethod
    def prepare():
        """Nothing is needed."""

    def answer(self, request, *arguments):
        """The process, its directory and where it looks first; its parent's process; or what the real one does."""
        if request == "where":
            return os.getpid(), os.getcwd(), sys.path[0]
        return os.getppid() if request == "parent" else super().answer(request, *arguments)
