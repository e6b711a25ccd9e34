"""`python -m dspo_jax.collect` as a process that can be killed and started again on the same port."""

import re
import subprocess
import sys

from processes import ROOT


class CollectProcess:
    """`collect` as a process, that can be killed and started again on the same port."""

    def __init__(self, folders, out, *flags):
        self._command = [sys.executable, "-m", "dspo_jax.collect", f"--out={out}", *flags]
        self._command += [f"--images={folder}" for folder in folders]
        self.url, self.process = "", None
        self.start()

    def start(self):
        port = self.url.rsplit(":", 1)[1] if self.url else "0"
        self.process = subprocess.Popen(
            [*self._command, f"--port={port}"], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        self.said = [self.process.stdout.readline() for _ in range(2)]
        self.url = re.search(r"http://[^:/]+:\d+", self.said[1])[0]

    def stop(self, number):
        self.process.send_signal(number)
        try:
            return self.process.wait(20), self.process.stdout.read()
        finally:
            self.process.kill()
            self.process.stdout.close()
