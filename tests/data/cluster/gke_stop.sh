set -e
kubectl delete jobset retro --namespace=default --ignore-not-found
