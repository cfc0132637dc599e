#!/usr/bin/env python3
"""Reads the messages of `cargo test --message-format json`; prints name and path of each test."""

import json
import sys

for line in sys.stdin:
    message = json.loads(line)
    if message["reason"] != "compiler-artifact" or not message["profile"]["test"]:
        continue
    if message["executable"]:
        kind = message["target"]["kind"][0]
        name = "unit" if kind == "lib" else message["target"]["name"]
        print(name, message["executable"])
