"""The evaluation tasks: each module that defines `TASK` adds one."""
