"""What the batch shell of a job calls that had begun before launch/life/ was there: bash has read its last line then.

python -m launch.supervisor RUN STAGE EXIT_CODE [SET]
"""

from __future__ import annotations

import sys

from launch.life.supervisor import main

if __name__ == "__main__":
    sys.exit(main())
