set -e
kubectl delete jobset retro --namespace=default --ignore-not-found
kubectl apply --filename=- <<'END'
{
  "apiVersion": "jobset.x-k8s.io/v1alpha2",
  "kind": "JobSet",
  "metadata": {
    "name": "retro",
    "namespace": "default",
    "annotations": {
      "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
  },
  "spec": {
    "failurePolicy": {
      "maxRestarts": 100
    },
    "network": {
      "enableDNSHostnames": true
    },
    "replicatedJobs": [
      {
        "name": "slice",
        "replicas": 2,
        "template": {
          "spec": {
            "parallelism": 16,
            "completions": 16,
            "completionMode": "Indexed",
            "backoffLimit": 0,
            "template": {
              "spec": {
                "restartPolicy": "Never",
                "terminationGracePeriodSeconds": 600,
                "nodeSelector": {
                  "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
                  "cloud.google.com/gke-tpu-topology": "4x4x4",
                  "cloud.google.com/gke-spot": "true"
                },
                "containers": [
                  {
                    "name": "train",
                    "image": "gcr.io/p/retro:1",
                    "command": [
                      "python",
                      "-m",
                      "launch.train",
                      "--gin_file=experiments/retro_172m.gin",
                      "--workdir=/mnt/shared/retro"
                    ],
                    "env": [
                      {
                        "name": "PYTHONUNBUFFERED",
                        "value": "1"
                      }
                    ],
                    "resources": {
                      "requests": {
                        "google.com/tpu": 4
                      },
                      "limits": {
                        "google.com/tpu": 4
                      }
                    },
                    "volumeMounts": [
                      {
                        "name": "memory",
                        "mountPath": "/dev/shm"
                      },
                      {
                        "name": "shared",
                        "mountPath": "/mnt/shared"
                      }
                    ]
                  }
                ],
                "volumes": [
                  {
                    "name": "memory",
                    "emptyDir": {
                      "medium": "Memory"
                    }
                  },
                  {
                    "name": "shared",
                    "persistentVolumeClaim": {
                      "claimName": "filestore"
                    }
                  }
                ]
              }
            }
          }
        }
      }
    ]
  }
}
END
