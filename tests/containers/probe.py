"""Exit with 0 only in a process that has as little as a container may give it.

Else with 1, and print what there is more: a writable root, a network, a home, a /tmp.
"""

import os
import socket
import sys

has = {
    'a writable root': not os.statvfs('/').f_flag & os.ST_RDONLY,
    'a network': [name for _, name in socket.if_nameindex()] != ['lo'],
    'a writable home': os.access(os.environ['HOME'], os.W_OK),
    'a writable /tmp': os.access('/tmp', os.W_OK),
    'another user than 12345': os.getuid() != 12345,
}
found = [what for what, there in has.items() if there]
if found:
    print(', '.join(found))
    sys.exit(1)
