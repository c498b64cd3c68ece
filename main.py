"""Train, sample, evaluate and analyze blur-noise diffusion models.

    python main.py --mode=sample --checkpoint=pretrained/cifar10_16 --workdir=runs/first
    python main.py --config=configs/digits.py --workdir=runs/digits

Exit status: 0 success; 2 wrong usage, explained in one line; 74 or 75 give the same command again
(docs/reliability.md)."""

import os
import signal
import sys
import traceback

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while the imports below go on

if "--debug" not in sys.argv:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # of XLA only what ends the process

from absl import app, flags

from configs import default
from warm_diffusion import app as modes
from warm_diffusion.app import settings
from warm_diffusion.runtime import console, processes
from warm_diffusion.training import signals

FLAGS = flags.FLAGS
MODES = {
    "train": lambda config, workdir, _: modes.train.train(config, workdir),
    "sample": lambda *job: modes.sample.sample(*job, FLAGS.seeds),
    "eval": lambda *job: modes.evaluate.evaluate(*job, FLAGS.wait),
    "fid_stats": lambda config, workdir, _: modes.fid_stats.write_statistics(config, workdir),
    "analyze": lambda *job: modes.analyze.analyze(*job[:2], FLAGS.checkpoint),
    "export": lambda *job: modes.export.export(*job),
    "restore": lambda *job: modes.restore.restore(
        *job,
        modes.restore.Request(*(FLAGS[flag].value for flag in modes.restore.Request._fields)),
    ),
    "info": lambda config, *_: modes.info.print_info(config, FLAGS.details),
}
settings.define_flags()
flags.adopt_module_key_flags(settings)
flags.DEFINE_enum("mode", "train", list(MODES), "The task.")
flags.DEFINE_string("workdir", None, "Folder for results; train continues the run in it.")
flags.DEFINE_string(
    "checkpoint",
    None,
    "sample, eval, fid_stats, analyze, export, restore, info: model folder, or training workdir "
    "[--workdir].",
)
flags.DEFINE_string("seeds", "0-63", "sample: such as 0-63 or 3,5,8-11.")
flags.DEFINE_float("wait", 0.0, "eval: seconds to wait for a checkpoint.")
flags.DEFINE_string("input", None, "restore: photograph, or folder of them (docs/restoration.md).")
flags.DEFINE_float("blur", None, "restore: blur, standard deviation in pixels [estimated].")
flags.DEFINE_float("noise", None, "restore: noise, in grey levels of 0..255 [estimated].")
flags.DEFINE_integer("samples", 0, "restore: number of posterior samples, besides the mean.")
flags.DEFINE_string(
    "reference", None, "restore: clean images of the same names, for PSNR and SSIM."
)
flags.DEFINE_bool("only_if_sure", False, "restore: skip images whose levels are in doubt.")
flags.DEFINE_bool("details", False, "info: also every key and the table of parameters.")


def fail(error: Exception) -> None:
    """Ends with one line, and for a fault of the program with its traceback before it."""
    status, line = modes.explain(error)
    if status == 1 or (FLAGS.is_parsed() and FLAGS.debug):
        traceback.print_exc()
    label = "" if isinstance(error, modes.Interrupted) else "error: "
    print(label + console.shorten(line, 2_000), file=sys.stderr)
    # Orbax's threads, which a failed save leaves, would be waited for: five minutes.
    processes.exit(status, at_once=status == 74 and __name__ == "__main__")


def parse(argv: list[str]) -> list[str]:
    """Reads the flags; a wrong one is one line, not a traceback."""
    try:
        return settings.parse(argv, default)
    except ValueError as error:
        fail(error)


def main(argv: list[str]) -> None:
    """Runs the mode; a mistake of the user's becomes one line."""
    try:
        with signals.quiet_end():
            config = settings.start(FLAGS, argv)
            MODES[FLAGS.mode](config, FLAGS.workdir, FLAGS.checkpoint or FLAGS.workdir)
    except signals.Ended as ended:
        processes.exit(ended.status)
    except Exception as error:
        fail(error)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
