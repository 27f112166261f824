"""Imported first by every script: Ctrl-C while PyTorch is loaded ends it without a traceback.  After that,
`common.run_script` says what was interrupted."""

import signal

if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in the background jobs of a shell
    signal.signal(signal.SIGINT, signal.SIG_DFL)
