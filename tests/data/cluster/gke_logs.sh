set -e
kubectl logs --namespace=default --selector=jobset.sigs.k8s.io/jobset-name=retro --follow --prefix --tail=100 --max-log-requests=8
