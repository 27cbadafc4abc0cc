"""
Commands of this repository in forks of one process that has loaded torch: quick to start.

    with Forks() as forks:
        child = forks.start('folder', 'train.py', '--loss=dpo', ...)    # prints into folder.txt
        child.signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL

One command at a time. The scripts are those of the repository, or of the copy of it that `root`
names. This file is also what the other process runs; it imports nothing of ours, so that each fork
reads the source as it is then. Left out: systems without fork.
"""
import ctypes
import json
import os
import resource
import runpy
import signal
import struct
import subprocess
import sys
import time
import traceback

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LIMIT = 120             # seconds until SIGALRM ends a command that hangs


class Child:
    """A command that runs, in a session of its own."""

    def __init__(self, pid, output, reply):
        self.pid, self.output, self.reply = pid, output, reply

    def signal(self, number):
        """SIGINT to all processes of the command, as Ctrl-C does; others to the first alone."""
        try:
            (os.killpg if number == signal.SIGINT else os.kill)(self.pid, number)
        except ProcessLookupError:      # ended just before
            pass

    def ended(self):
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        return False

    def wait(self):
        """-> the exit code; below 0, the signal that ended it."""
        return int(self.reply.readline())

    def printed(self):
        with open(self.output, encoding='utf-8') as f:
            return f.read()


class Forks:
    def __init__(self, root=ROOT):
        self.root = str(root)

    def __enter__(self):
        env = dict(os.environ, OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE')
        self.process = subprocess.Popen([sys.executable, os.path.abspath(__file__)], env=env,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        bufsize=1)
        return self

    def __exit__(self, *exc):
        self.process.stdin.close()
        self.process.wait()

    def start(self, folder, script, *options, root=None, file_limit=0, unprivileged=False):
        """`file_limit`: no file can grow beyond so many bytes, as on a full disk. `unprivileged`:
        permissions apply to root, too."""
        folder = os.path.abspath(folder)
        job = dict(folder=folder, argv=[script, *map(str, options)], output=f'{folder}.txt',
                   root=str(root or self.root), file_limit=file_limit, unprivileged=unprivileged)
        open(job['output'], 'w').close()                   # of the command before
        self.process.stdin.write(json.dumps(job) + '\n')
        return Child(int(self.process.stdout.readline()), job['output'], self.process.stdout)

    def run(self, folder, script, *options, **limits):
        """-> (the exit code, what it printed)"""
        child = self.start(folder, script, *options, **limits)
        return child.wait(), child.printed()


def until(condition, seconds=60):
    """Wait until condition() is true, polling without a pause; False where it takes longer."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
    return True


def become(job):
    """The fork's part: what the job says, then the command."""
    os.setsid()
    signal.alarm(LIMIT)
    os.chdir(job['folder'])
    output = os.open(job['output'], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for there, here in ((output, 1), (output, 2), (os.open(os.devnull, os.O_RDONLY), 0)):
        os.dup2(there, here)
    sys.stdout.reconfigure(line_buffering=True)
    if job['file_limit']:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job['file_limit'],) * 2)
    if job['unprivileged'] and os.geteuid() == 0:
        header = struct.pack('Ii', 0x20080522, 0)       # Linux's capset, version 3: this process
        if ctypes.CDLL(None).capset(header, bytes(24)):
            sys.exit('capset failed')
    sys.path[0] = job['root']           # in place of tests/, as `python SCRIPT` sets it
    sys.argv, code = job['argv'], 0
    try:
        runpy.run_path(os.path.join(job['root'], job['argv'][0]), run_name='__main__')
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        print(e.code if isinstance(e.code, str) else '', end='', file=sys.stderr)
    except BaseException:
        code = traceback.print_exc() or 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)          # to take the interpreter down in order would take most of a second


def main():
    import torch
    torch.set_num_threads(1)
    import safetensors.torch    # noqa: F401
    import tiktoken             # noqa: F401
    import torch._dynamo        # noqa: F401: AdamW asks for it at its first step
    import torch.distributed    # noqa: F401
    import tqdm                 # noqa: F401
    while line := sys.stdin.readline():
        if pid := os.fork():
            print(pid, flush=True)
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        else:
            become(json.loads(line))


if __name__ == '__main__':
    main()
