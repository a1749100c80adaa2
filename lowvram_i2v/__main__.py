"""`python3 -m lowvram_i2v`: the command line, from a source tree with nothing installed as well."""

import sys

from lowvram_i2v.cli import main

sys.exit(main())
