"""``bids_brainfm_models pretrain`` and ``finetune``: the options, and what they come to."""

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from bids_brainfm import surroundings
from bids_brainfm.arguments import number, positive, proportion, ratio, seed
from bids_brainfm.config import PRECISIONS, absolute, available_cpus
from bids_brainfm.errors import BrainfmError

path = lambda text: Path(text).absolute()
COMMANDS = ('pretrain', 'finetune')
INTERRUPTED = 143  # exit code of an interrupted process that has written a checkpoint


# fmt: off
def add_commands(commands: 'argparse._SubParsersAction[argparse.ArgumentParser]') -> None:
    """Add both commands to the subparsers of ``bids_brainfm_models``."""
    pretraining = commands.add_parser(
        'pretrain',
        help='train a network on parcel series of your own',
        description='Pretrain a network of the form of CARD on parcel series that "bids_brainfm '
        'DATA OUT participant" wrote, and write it to OUT with a card that --model takes '
        '(--model OUT/card.yml). The same command goes on where an earlier one was interrupted. '
        'On several GPUs or nodes: torchrun --nproc-per-node N --no-python bids_brainfm_models '
        'pretrain ..., or srun.',
    )
    _add_common(pretraining, 'CARD', 'a model (see list), or the path of a card of your own')
    add = pretraining.add_argument_group('objective').add_argument
    share = number(float, lambda x: 0 < x <= 0.9, 'a proportion above 0, up to 0.9')
    add('--mask-ratio', type=share,
        help="BrainLM: proportion that is masked (default: the model's own)")
    add('--masking', choices=('random', 'future'), default='random',
        help='BrainLM: mask tokens at random, or the last time points (default: random)')
    add('--loss', choices=('mse', 'mae'), help="BrainLM: error (default: the model's own)")
    add('--warm-start', action='store_true',
        help='start from the weights of the model instead of random ones')

    tuning = commands.add_parser(
        'finetune',
        help='fit a model to predict a column of participants.tsv',
        description='Fit a head on MODEL that predicts a column of participants.tsv from parcel '
        'series that "bids_brainfm DATA OUT participant" wrote. Participants are split into '
        'training, validation (which picks the best epoch; not with --mode probe) and test. Test '
        'scores are compared with a constant, with linear regression on the connectome and, with '
        '--mode probe, on embeddings by random weights. '
        '"bids_brainfm DATA OUT participant --model OUT/card.yml" then writes predictions.',
    )
    _add_common(tuning, 'MODEL', 'a model (see list), NAME=CHECKPOINT, or the path of a card')
    add = tuning.add_argument_group('prediction').add_argument
    add('--target', required=True, metavar='COLUMN', help='column of participants.tsv')
    add('--problem', choices=('regression', 'classification'),
        help='default: classification for text and for two values, else regression')
    add('--mode', choices=('full', 'head', 'probe'), default='full',
        help='full: the whole network learns; head: only a linear head learns, by gradient '
        'descent; probe: ridge or logistic regression on the frozen embeddings, the penalty '
        'chosen by cross-validation (default: full)')
    add('--pooling', choices=('class-token', 'mean'),
        help='what the head is given (default: the class token where there is one)')
    add('--dropout', type=number(float, lambda x: 0 <= x < 1, 'a proportion from 0 to below 1'),
        default=0.0, help='of the head (default: 0)')
    add('--drop-missing', action='store_true', help='leave out participants without a value')
    add('--random-weights', action='store_true', help='control: start from an untrained network')
    add('--patience', type=positive(int), metavar='EPOCHS',
        help='end after so many epochs without a better validation score')
    add('--test-share', type=ratio, default=0.2,
        help='proportion of participants in the test part (default: 0.2)')


def _add_common(parser: argparse.ArgumentParser, what: str, explained: str) -> None:
    parser.add_argument('model', metavar=what, type=absolute, help=explained)
    parser.add_argument('output', metavar='OUT', type=path)
    add = parser.add_argument_group('data').add_argument
    add('--data', nargs='+', required=True, metavar='DERIV', type=path,
        help='outputs of "bids_brainfm DATA OUT participant"')
    add('--scale', choices=('run-robust', 'global-z', 'parcel-z', 'cohort', 'none'),
        help="scaling of the series (default: the model's own)")
    add('--scale-stats', metavar='FILE', type=path, help='fitted statistics, for --scale cohort')
    add('--min-coverage', type=proportion, default=0.5,
        help='parcels below take the series of the nearest above (default: 0.5)')
    add('--mix-trs', action='store_true',
        help='take runs of different repetition times, all resampled to that of the model')
    add('--strides', nargs='+', type=positive(int), default=[1], metavar='N',
        help='augment the repetition time: a window takes every N-th sample, N at random of '
        'these (default: 1)')
    add('--max-flagged', type=proportion, metavar='PROPORTION',
        help='leave out runs with a greater proportion of flagged volumes (default: those that '
        'the participant level excluded). Flagged volumes are never learned in pretraining, nor '
        'scored')
    add('--group-column', nargs='+', default=[], metavar='COLUMN',
        help='columns of participants.tsv, such as family or site: participants with the same '
        'value are in the same part of the split')
    add('--validation-share', type=ratio,
        help='proportion of participants in the validation part (default: 0.1, finetune 0.2)')
    add = parser.add_argument_group('training').add_argument
    add('--recipe', metavar='NAME',
        help='schedule (default: that of the family): brainlm-vit, brainlm-legacy, fixed or '
        'official for Brain-JEPA, finetune, head, or a file of your own')
    add('--epochs', type=positive(float), help="default: the recipe's")
    add('--batch-size', type=positive(int),
        help="windows in a step, over all processes (default: the recipe's)")
    add('--micro-batch-size', type=positive(int),
        help='windows that a process takes at once; gradients of several are added up '
        '(default: its part of the batch)')
    add('--lr', type=positive(float), help="highest learning rate (default: the recipe's)")
    add('--seed', type=seed, default=0, help='default: 0')
    add('--name', help='name of the trained model (default: that of OUT)')
    add('--checkpoint-steps', type=positive(int), default=200,
        help='steps between checkpoints (default: 200)')
    add('--evaluate-epochs', type=positive(float), default=1.0,
        help='epochs between evaluations (default: 1)')
    add('--resume', metavar='CHECKPOINT', type=path,
        help='checkpoint to go on from (default: the latest in OUT/checkpoints)')
    add = parser.add_argument_group('machine').add_argument
    add('--device', choices=('auto', 'cpu', 'cuda'), default='auto')
    add('--precision', choices=PRECISIONS,
        help='precision of matrix products (default: float32 on the CPU, bfloat16 on a GPU, or '
        'tf32 there for --mode head and probe, which do not train the network)')
    add('--nthreads', '--n-cpus', '--n_cpus', dest='nthreads', type=positive(int),
        help='CPU threads of a process (default: those at hand, shared by the processes here)')
    add('--workers', type=number(int, lambda n: n >= 0, 'a whole number from 0'), default=0,
        help='processes that read windows ahead (default: 0)')
# fmt: on


def join_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """Environment that torch needs to find its processes where srun started several.

    Empty in a batch script without srun, which has no `SLURM_STEP_NUM_TASKS`.
    """
    tasks = environment.get('SLURM_STEP_NUM_TASKS', '1')
    if 'RANK' in environment or tasks == '1':
        return {}
    nodes = environment['SLURM_STEP_NODELIST']
    port = str(20_000 + int(environment['SLURM_JOB_ID']) % 20_000)
    return {
        'RANK': environment['SLURM_PROCID'],
        'LOCAL_RANK': environment['SLURM_LOCALID'],
        'WORLD_SIZE': tasks,
        'LOCAL_WORLD_SIZE': environment['SLURM_STEP_TASKS_PER_NODE'].partition('(')[0],
        'MASTER_ADDR': environment.get('MASTER_ADDR') or _first_node(nodes),
        'MASTER_PORT': environment.get('MASTER_PORT') or port,
    }


def _first_node(nodes: str) -> str:
    """First of Slurm's list of nodes.

    >>> _first_node('gpu[07-09,12],big1'), _first_node('n1,n2')
    ('gpu07', 'n1')
    """
    name, bracket, rest = nodes.partition('[')
    if not bracket or ',' in name:
        return nodes.split(',')[0]
    return name + rest.replace('-', ',').replace(']', ',').split(',')[0]


def run(options: argparse.Namespace) -> int:
    """Run one of the commands; returns the exit code. Only the first process raises errors."""
    os.environ.update(join_slurm(os.environ))
    import torch

    from bids_brainfm.resources import home
    from bids_brainfm.training import job
    from bids_brainfm.training.engine import Interrupted
    from bids_brainfm.training.session import is_first_process
    from bids_brainfm.training.settings import TrainingSettings

    if options.workers:
        surroundings.place_sockets()
    here = int(os.environ.get('LOCAL_WORLD_SIZE', '1'))
    nthreads = options.nthreads or max(1, available_cpus() // here)
    torch.set_num_threads(nthreads)
    asked = {k: v for k, v in vars(options).items() if k != 'command'} | {'nthreads': nthreads}
    lists = {name: tuple(asked[name]) for name in ('data', 'strides', 'group_column')}
    asked |= lists | {'home': home()}
    settings = TrainingSettings(**asked)
    try:
        card = {'pretrain': job.pretrain, 'finetune': job.finetune}[options.command](settings)
    except BrainfmError:
        if not is_first_process():
            return 2
        raise
    except Interrupted:
        if is_first_process():
            words = 'Training was interrupted; its checkpoint is written.'
            print(f'{words} The same command goes on from there.', file=sys.stderr)
        return INTERRUPTED
    if card is not None:
        print(f'The trained model is {card}: give it as --model.')
        if (scores := card.with_name('scores.json')).is_file():
            print(f'Its scores on the test part, with those of the baselines, are in {scores}.')
    return 0
