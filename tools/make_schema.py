"""Write the JSON Schema of profile.json, which ships in the package.

python tools/make_schema.py > m2dexport/data/profile.schema.json
"""

import argparse
import json

from m2dexport.profile.manifest import profile_schema

if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print(json.dumps(profile_schema(), indent=2, sort_keys=True))
