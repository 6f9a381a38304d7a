"""A job array, the two stages, the chain after fMRIPrep and Nipype's plugin, on a real Slurm.

Run by ``tests/slurm/run.sh``, which starts one. Whatever the way, the outputs must be those of one
process, byte by byte.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / 'singularity'
LABELS = ('01', '02', '03')
APP = (sys.executable, '-m', 'bids_brainfm.cli.run')

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which('sinfo') is None or 'SLURM_CONF' not in os.environ,
        reason='no Slurm runs: tests/slurm/run.sh starts one',
    ),
]


def run(*command, cwd: Path, **variables) -> subprocess.CompletedProcess:
    """Run a command to its end; jobs import the code of this checkout."""
    env = {**os.environ, 'PYTHONPATH': str(ROOT), **variables}
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Simulated dataset of three participants."""
    from bids_brainfm.cli.demo import write_dataset

    folder = tmp_path_factory.mktemp('simulated') / 'data'
    write_dataset(folder, participants=len(LABELS), volumes=210)
    return folder


@pytest.fixture(scope='module')
def reference(data, tmp_path_factory):
    """Output of one process over all participants."""
    place = tmp_path_factory.mktemp('reference')
    ended = run(
        *APP, data, 'out', 'participant', '--model', 'brainlm-demo', '--nprocs', 1, cwd=place
    )
    assert ended.returncode == 0, ended.stderr
    return contents(place / 'out')


@pytest.fixture
def study(data, tmp_path):
    """Folder to submit from: the scripts that we ship, with settings for this machine."""
    place = Path(shutil.copytree(SCRIPTS, tmp_path / 'study'))
    (place / 'participants.txt').write_text('\n'.join(LABELS))
    (place / 'settings.sh').write_text(
        f'fmriprep={data}\noutput={tmp_path}/out\nwork={tmp_path}/work\nmodels=(brainlm-demo)\n'
        f'participants=participants.txt\nbrainfm=({shlex.join(APP)})\n'
    )
    return place


def contents(out: Path) -> dict[str, bytes]:
    """All files of a dataset but the log and the settings of each process."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob('*'))
        if path.is_file() and not re.match(r'logs/\d{8}-', str(path.relative_to(out)))
    }


def check(out: Path, reference: dict[str, bytes]) -> None:
    """See that a dataset is the reference, and valid."""
    found = contents(out)
    assert sorted(found) == sorted(reference)
    assert [name for name in found if found[name] != reference[name]] == []
    validator = Path(sys.executable).with_name('bids-validator-deno')
    ended = run(validator, out, '--format', 'json', cwd=out)
    assert json.loads(ended.stdout)['issues']['issues'] == []


def submit(study: Path, *arguments) -> str:
    """Submit a script; returns the job's number."""
    ended = run('sbatch', '--parsable', *arguments, cwd=study)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


def wait_until(condition, study: Path, seconds: float = 300) -> None:
    """Wait until something holds, and show the jobs' logs where it never does."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            logs = '\n'.join(path.read_text() for path in sorted(study.glob('*.log')))
            pytest.fail(f'not so after {seconds:.0f} s; the logs:\n{logs}')
        time.sleep(0.2)


def wait_for(study: Path, job: str) -> None:
    """Wait until all tasks of a job have ended, and see that they ended well."""
    wait_until(lambda: not run('squeue', '--noheader', '--jobs', job, cwd=study).stdout, study)
    states = re.findall(r'JobState=(\S+)', run('scontrol', 'show', 'job', job, cwd=study).stdout)
    logs = '\n'.join(path.read_text() for path in sorted(study.glob('*.log')))
    assert set(states) == {'COMPLETED'}, f'{states}\n{logs}'


TASKS = f'--array=1-{len(LABELS)}'


def test_array_over_participants(study, reference):
    """A task a participant, side by side, into one folder."""
    wait_for(study, submit(study, TASKS, 'participants.sbatch'))
    check(study.parent / 'out', reference)
    assert len(list(study.glob('brainfm-*.log'))) == len(LABELS)


def test_task_that_is_put_back_into_the_queue(study, reference):
    """As after preemption: a task that is killed amid its work goes on when it starts again."""
    job = submit(study, TASKS, 'participants.sbatch')
    # The quality metrics are the last of what is made without a model
    wait_until(lambda: list(study.parent.glob('out/sub-01/func/*_desc-quality_bold.json')), study)
    assert run('scontrol', 'requeue', f'{job}_1', cwd=study).returncode == 0
    pending = ('squeue', '-h', '-t', 'PENDING', '-j', f'{job}_1')
    wait_until(lambda: run(*pending, cwd=study).stdout, study)
    # else Slurm waits for two minutes; at once it may still be clearing away the first start
    run('scontrol', 'update', f'JobId={job}_1', 'StartTime=now+10', cwd=study)
    wait_for(study, job)
    check(study.parent / 'out', reference)
    log = (study / f'brainfm-{job}_1.log').read_text()
    assert 'DUE TO JOB REQUEUE' in log
    assert '0 parcel series to make' in log


def test_two_stages(study, reference):
    """Parcel series by an array without models, then one job that encodes them all."""
    out = study.parent / 'out'
    wait_for(study, submit(study, TASKS, 'participants.sbatch', '--stop-after', 'timeseries'))
    assert len(list(out.glob('sub-*/func/*_timeseries.tsv'))) == len(LABELS)
    assert not list(out.glob('sub-*/func/*_desc-brainlmdemo_*'))
    wait_for(study, submit(study, 'encode.sbatch', '--device', 'cpu'))
    check(out, reference)
    assert '0 parcel series to make' in next(study.glob('brainfm-encode-*.log')).read_text()


def test_chain_after_fmriprep(study, data, reference):
    """Each participant follows when fMRIPrep is done with it, and a lost one keeps no other."""
    place = study.parent / 'data'
    # Instead of fMRIPrep: brings what it would write, and fails for one participant
    (study / 'fmriprep.sh').write_text(
        f'set -e\ncp -pn {data}/*.* {place}/\ntest "$5" != 02\ncp -pr {data}/sub-"$5" {place}/\n'
    )
    with (study / 'settings.sh').open('a') as file:
        file.write(f'fmriprep={place}\nbids=raw\nfreesurfer_license=none\n')
        file.write(f'run_fmriprep=(bash {study}/fmriprep.sh)\n')
    ended = run('bash', 'chain.sh', '--device', 'cpu', cwd=study)
    assert ended.returncode == 0, ended.stderr
    wait_for(study, ended.stdout.split()[-1])
    check(
        study.parent / 'out',
        {
            name: content.replace(data.as_uri().encode(), place.as_uri().encode())
            for name, content in reference.items()
            if 'sub-02' not in name
        },
    )


def test_plugin(data, reference, tmp_path, monkeypatch):
    """Nipype sends the nodes to Slurm, also where the user's name is unknown."""
    monkeypatch.delenv('LOGNAME', raising=False)
    plugin = tmp_path / 'slurm.yml'
    plugin.write_text('plugin: SLURM\nplugin_args:\n  sbatch_args: --mem=1G --cpus-per-task=2\n')
    ended = run(
        *APP, data, 'out', 'participant', '--model', 'brainlm-demo', '--use-plugin', plugin,
        cwd=tmp_path,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    check(tmp_path / 'out', reference)
    # the scripts' jobs have names of their own
    jobs = run('squeue', '-h', '-t', 'all', '-o', '%j', cwd=tmp_path).stdout.split()
    jobs = [name for name in jobs if not name.startswith(('brainfm', 'fmriprep'))]
    assert sorted(jobs) == ['encode', *(f'series_{number}' for number in range(len(LABELS)))]
