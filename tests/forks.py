"""A process that has imported what every command imports, and forks for each command that it reads: a test need not wait for PyTorch.

A line on stdin is JSON, {"argv", "cwd", "env", "stdout", "stderr", "seconds", "file_size"}: stdout and stderr are files; after so many seconds it
is killed; no file may become larger than file_size bytes, as if the disk were full (0: any). The line back is the exit code, negative for a signal, as subprocess has it. The command runs as __main__, with its own arguments, folder, environment and files.
"""
import contextlib
import json
import os
import resource
import runpy
import signal
import sys
import time
import traceback


def become(command):
    """In the forked child: run the command -> exit code."""
    for descriptor, (path, flags) in enumerate(((os.devnull, os.O_RDONLY), (command["stdout"], os.O_WRONLY), (command["stderr"], os.O_WRONLY))):
        os.dup2(os.open(path, flags), descriptor)
    sys.stdin, sys.stdout, sys.stderr = (open(i, "rw"[i > 0], encoding="utf-8", errors="backslashreplace" if i == 2 else None) for i in range(3))
    if command["file_size"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (command["file_size"],) * 2)
    os.chdir(command["cwd"])
    os.environ.clear()
    os.environ.update(command["env"])
    sys.argv = command["argv"][1:] if command["argv"][0] == "-c" else command["argv"]
    try:
        if command["argv"][0] == "-c":
            sys.argv = ["-c", *command["argv"][2:]]
            exec(compile(command["argv"][1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_path(command["argv"][0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main():
    sys.path.insert(0, os.getcwd())
    import clip_features, hyperpelt  # noqa: F401 (and with them torch, numpy, safetensors, tqdm, sentencepiece)
    import sentencepiece  # noqa: F401
    import torch._dynamo  # noqa: F401 (an optimiser loads it)
    with contextlib.suppress(ImportError):
        import matplotlib.figure  # noqa: F401
    commands = os.fdopen(os.dup(0))
    for line in iter(commands.readline, ""):
        command, child, status, ended = json.loads(line), os.fork(), 0, 0
        if child == 0:
            code = 1
            try:
                code = become(command)
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(code)
        end = time.monotonic() + command["seconds"]
        while time.monotonic() < end and not ended:
            ended, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0 if ended else 0.001)
        if not ended:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
