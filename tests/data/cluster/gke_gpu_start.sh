set -e
kubectl delete jobset retro --namespace=ml --ignore-not-found
kubectl apply --filename=- <<'END'
{
  "apiVersion": "jobset.x-k8s.io/v1alpha2",
  "kind": "JobSet",
  "metadata": {
    "name": "retro",
    "namespace": "ml",
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
        "replicas": 1,
        "template": {
          "spec": {
            "parallelism": 4,
            "completions": 4,
            "completionMode": "Indexed",
            "backoffLimit": 0,
            "template": {
              "spec": {
                "restartPolicy": "Never",
                "terminationGracePeriodSeconds": 600,
                "nodeSelector": {
                  "cloud.google.com/gke-accelerator": "nvidia-h100-80gb"
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
                      },
                      {
                        "name": "JAX_COORDINATOR_ADDRESS",
                        "value": "retro-slice-0-0.retro:55527"
                      },
                      {
                        "name": "NNODES",
                        "value": "4"
                      },
                      {
                        "name": "HOSTS_A_SLICE",
                        "value": "4"
                      },
                      {
                        "name": "SLICE_INDEX",
                        "valueFrom": {
                          "fieldRef": {
                            "fieldPath": "metadata.labels['jobset.sigs.k8s.io/job-index']"
                          }
                        }
                      }
                    ],
                    "resources": {
                      "requests": {
                        "nvidia.com/gpu": 8,
                        "cpu": "32",
                        "memory": "200Gi"
                      },
                      "limits": {
                        "nvidia.com/gpu": 8,
                        "cpu": "32",
                        "memory": "200Gi"
                      }
                    },
                    "volumeMounts": [
                      {
                        "name": "memory",
                        "mountPath": "/dev/shm"
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
