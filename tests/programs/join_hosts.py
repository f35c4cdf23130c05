"""One of three processes, of which the last never comes. Arguments: address, which one."""

import sys

from lib.parallel.hosts import start_hosts

start_hosts(sys.argv[1], 3, int(sys.argv[2]), 4)
