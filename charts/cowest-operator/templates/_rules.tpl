{{/* What the operator does in the namespaces whose jobs it keeps. */}}
{{- define "cowest-operator.rules" -}}
{{- $children := list "list" "watch" "create" "patch" "delete" | toJson -}}
- apiGroups: [cowest.dev]
  resources: [collaborationjobs]
  verbs: [list, watch, patch]
- apiGroups: [cowest.dev]
  resources: [collaborationjobs/status]
  verbs: [patch]
- apiGroups: [""]
  resources: [configmaps, services, serviceaccounts]
  verbs: {{ $children }}
# Prompts, a trial's frozen manifest and a routing that was there already.
- apiGroups: [""]
  resources: [configmaps]
  verbs: [get]
# The book of paid calls goes with its job, never before.
- apiGroups: [""]
  resources: [persistentvolumeclaims]
  verbs: [list, watch, create, patch]
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch]
- apiGroups: [apps]
  resources: [deployments]
  verbs: {{ $children }}
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: {{ $children }}
- apiGroups: [autoscaling]
  resources: [horizontalpodautoscalers]
  verbs: {{ $children }}
- apiGroups: [networking.k8s.io]
  resources: [ingresses]
  verbs: {{ $children }}
- apiGroups: [rbac.authorization.k8s.io]
  resources: [roles, rolebindings]
  verbs: {{ $children }}
- apiGroups: [serving.kserve.io]
  resources: [inferenceservices]
  verbs: {{ $children }}
- apiGroups: [argoproj.io]
  resources: [workflowtemplates]
  verbs: {{ $children }}
# A step is submitted once; patch is for the note that its pods are over, which makes Argo look at once.
- apiGroups: [argoproj.io]
  resources: [workflows]
  verbs: [get, list, watch, create, patch, delete]
{{- if .Values.rayservice.enabled }}
- apiGroups: [ray.io]
  resources: [rayservices]
  verbs: {{ $children }}
{{- end }}
# Not used by the operator: a Role that it makes for a job's steps grants it, and nobody may grant more than they have.
- apiGroups: [argoproj.io]
  resources: [workflowtaskresults]
  verbs: [create, patch]
- apiGroups: [""]
  resources: [events]
  verbs: [create]
{{- end -}}
