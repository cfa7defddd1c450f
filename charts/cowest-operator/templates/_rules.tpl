{{/* What the operator does in the namespaces whose jobs it keeps. */}}
{{- define "cowest-operator.rules" -}}
{{- $children := list "get" "list" "watch" "create" "patch" "delete" | toJson -}}
- apiGroups: [cowest.dev]
  resources: [collaborationjobs]
  verbs: [get, list, watch, patch]
- apiGroups: [cowest.dev]
  resources: [collaborationjobs/status]
  verbs: [patch]
- apiGroups: [cowest.dev]
  resources: [collaborationjobs/finalizers]
  verbs: [update]
- apiGroups: [""]
  resources: [configmaps, services, persistentvolumeclaims, serviceaccounts]
  verbs: {{ $children }}
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch]
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
  resources: [workflows, workflowtemplates]
  verbs: {{ $children }}
{{- if .Values.rayservice.enabled }}
- apiGroups: [ray.io]
  resources: [rayservices]
  verbs: {{ $children }}
{{- end }}
# Not used by the operator: a Role that it makes for a job's steps grants it, and nobody may grant more than they have.
- apiGroups: [argoproj.io]
  resources: [workflowtaskresults]
  verbs: [create, patch]
# Only metadata is asked for: whether a Secret that a job names is there, and which version.
- apiGroups: [""]
  resources: [secrets]
  verbs: [list, watch]
- apiGroups: [""]
  resources: [events]
  verbs: [create, patch]
{{- end -}}
