"""An S3-compatible store over HTTPS, in memory, that checks signatures and rights: moto, from the package index.

Arguments: certificate, key, CA. Prints one line of JSON: port, key_id and secret of a user who may do what backups need in
the bucket `backups`, and nothing in the bucket `foreign`. Then answers each line of its input, a bucket's name, with the
objects that are in it and the number of uploads that were begun and not ended. Ends with its input.
"""

import json
import ssl
import sys
import threading
import urllib.request

import boto3
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.s3.models import s3_backends
from werkzeug.serving import WSGIRequestHandler, make_server


class Silent(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, *_):
        pass


certificate, key, ca = sys.argv[1:]
application = DomainDispatcherApplication(create_backend_app)
server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Silent, ssl_context=(certificate, key))
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"https://127.0.0.1:{server.server_port}"

anybody = {"endpoint_url": url, "verify": ca, "region_name": "us-east-1"}
anybody |= {"aws_access_key_id": "none", "aws_secret_access_key": "none"}
s3, iam = boto3.client("s3", **anybody), boto3.client("iam", **anybody)
for bucket in ("backups", "foreign"):
    s3.create_bucket(Bucket=bucket)
iam.create_user(UserName="izar")
actions = ["s3:PutObject", "s3:GetObject", "s3:DeleteObject", "s3:ListBucket", "s3:AbortMultipartUpload"]
resources = ["arn:aws:s3:::backups", "arn:aws:s3:::backups/*", "arn:aws:s3:::missing", "arn:aws:s3:::missing/*"]
policy = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": actions, "Resource": resources}]}
iam.put_user_policy(UserName="izar", PolicyName="backups", PolicyDocument=json.dumps(policy))
access = iam.create_access_key(UserName="izar")["AccessKey"]
# From here on nobody does anything without a key.
plain = {"Content-Type": "text/plain"}
reset = urllib.request.Request(f"{url}/moto-api/reset-auth", data=b"0", headers=plain, method="POST")
urllib.request.urlopen(reset, context=ssl.create_default_context(cafile=ca)).read()

known = {"port": server.server_port, "key_id": access["AccessKeyId"], "secret": access["SecretAccessKey"]}
print(json.dumps(known), flush=True)
for line in sys.stdin:
    (backend,) = [found for account in s3_backends.values() for found in account.values() if line.strip() in found.buckets]
    bucket = backend.buckets[line.strip()]
    print(json.dumps({"objects": sorted(bucket.keys.keys()), "uploads": len(bucket.multiparts)}), flush=True)
