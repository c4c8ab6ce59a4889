"A PostgreSQL server of our own for the tests: on loopback, at a free port, in a temporary folder, with one role that needs a password."
import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

PASSWORD = "s3cret/of:ann"


def find(program):
    "Path of a PostgreSQL program: Debian keeps the server's out of PATH."
    places = [p for p in (shutil.which(program),) if p] + sorted(map(str, Path("/usr/lib/postgresql").glob(f"*/bin/{program}")), reverse=True)
    return places[0] if places else None


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    "Start with `start()`, stop with `stop()` or, as a crash would, with `kill()`."
    def __init__(self):
        self.port, self.folder = free_port(), Path(tempfile.mkdtemp(prefix="pg"))
        # initdb refuses to run as root, so root becomes the user that Debian's package made
        self.become = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        if self.become: shutil.chown(self.folder, "postgres")
        self.run("initdb", "-D", self.data, "-A", "trust", "-U", "postgres", "-E", "UTF8", "--no-locale", "--no-sync")
        (self.data / "pg_hba.conf").write_text("host all ann 127.0.0.1/32 scram-sha-256\nhost all all 127.0.0.1/32 trust\n")

    @property
    def data(self): return self.folder / "data"

    def run(self, program, *arguments, text=None):
        done = subprocess.run([*self.become, find(program), *map(str, arguments)], input=text, capture_output=True, text=True, cwd=self.folder)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start(self):
        options = f"-p {self.port} -h 127.0.0.1 -k {self.folder} -F"
        self.run("pg_ctl", "-D", self.data, "-o", options, "-l", self.folder / "log", "-w", "start")

    def stop(self, mode="fast"): self.run("pg_ctl", "-D", self.data, "-m", mode, "-w", "stop")
    def kill(self): self.stop("immediate")

    def url(self, database, user="postgres", password=None):
        login = user if password is None else f"{user}:{password}"
        return f"postgresql://{login}@127.0.0.1:{self.port}/{database}"

    def sql(self, text, database="postgres"):
        return self.run("psql", "-h", "127.0.0.1", "-p", self.port, "-U", "postgres", "-d", database, "-q", "-v", "ON_ERROR_STOP=1", text=text)
