"""
Commands of this repository in forks of one process that has loaded torch: quick to start.

    with Forks() as forks:
        assert forks.run('folder', 'train.py', '--loss=dpo', ...)[0] == 0    # prints to folder.txt

One at a time. The other process runs this file, which imports nothing of ours, so that each fork
reads the source as it is then. Left out: systems without fork.
"""
import contextlib
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import time
import traceback

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Forks:
    def __enter__(self):
        env = dict(os.environ, OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE')
        self.process = subprocess.Popen([sys.executable, __file__], env=env, bufsize=1, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return self

    def __exit__(self, *exc):
        self.process.stdin.close()
        self.process.wait()

    def start(self, folder, script, *options, root=ROOT, file_limit=0):
        """A command of `root`, the repository or a copy, in a session of its own -> self.
        `file_limit`: no file can grow beyond so many bytes, as on a full disk."""
        folder = os.path.abspath(folder)
        self.output = f'{folder}.txt'
        open(self.output, 'w').close()                     # of the command before
        self.process.stdin.write(json.dumps(dict(
            folder=folder, argv=[script, *map(str, options)], output=self.output, root=str(root),
            file_limit=file_limit)) + '\n')
        self.pid = int(self.process.stdout.readline())
        return self

    def signal(self, number):
        """SIGINT to all processes of the command, as Ctrl-C does; others to the first alone."""
        with contextlib.suppress(ProcessLookupError):      # ended just before
            (os.killpg if number == signal.SIGINT else os.kill)(self.pid, number)

    def ended(self):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, 0)
            return False
        return True

    def wait(self):
        """-> the exit code; below 0, the signal that ended it."""
        return int(self.process.stdout.readline())

    def printed(self):
        with open(self.output, encoding='utf-8') as f:
            return f.read()

    def run(self, *command, **limits):
        """-> (the exit code, what it printed)"""
        return self.start(*command, **limits).wait(), self.printed()


def until(condition, seconds=60):
    """Wait until condition() is true, polling without a pause; False where it takes longer."""
    end = time.monotonic() + seconds
    while not (done := condition()) and time.monotonic() < end:
        pass
    return bool(done)


def become(job):
    """The fork's part: what the job says, then the command."""
    os.setsid()
    signal.alarm(120)                   # seconds until SIGALRM ends a command that hangs
    os.chdir(job['folder'])
    output = os.open(job['output'], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for there, here in ((output, 1), (output, 2), (os.open(os.devnull, os.O_RDONLY), 0)):
        os.dup2(there, here)
    sys.stdout.reconfigure(line_buffering=True)
    if job['file_limit']:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job['file_limit'],) * 2)
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


if __name__ == '__main__':
    # what each command would load; AdamW asks for torch._dynamo at its first step
    import safetensors.torch, tiktoken, torch._dynamo, torch.distributed, tqdm    # noqa: E401, F401
    torch.set_num_threads(1)
    while line := sys.stdin.readline():
        if pid := os.fork():
            print(pid, flush=True)
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        else:
            become(json.loads(line))
